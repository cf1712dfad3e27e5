"""`so8t layers`: rank the layers of a model in which a rotation would learn most, by the first step's gradient.

`placement` computes the ranking. This file loads model and rows, and draws one column for each layer and one row for
each target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline.config import ConfigError, RunConfig, parse_config
from pipeline.data.build import build_dataset
from pipeline.tokenizer import load_tokenizer
from pipeline.train.collate import Collator, EncodedRows
from pipeline.train.fit import load_base
from pipeline.train.placement import Place, rank
from pipeline.train.trainer import first_rows
from so8t_core.checkpoint_admission import admit_checkpoint
from so8t_core.errors import InputError
from so8t_core.files import atomic_file


def ranked_places(
    directory: Path, rows: Path, *, targets: Sequence[str] = (), batch_size: int = 4, seed: int = 0
) -> list[Place]:
    """Every layer and target of the model in `directory` by the gradient over the first `batch_size` rows.

    Args:
        rows: a JSONL or Parquet file in any format of `so8t data`.
        targets: names of linear layers; empty means all.

    Raises:
        InputError: no model, no row that may be trained on, or a target that does not exist.
    """
    admit_checkpoint(directory)
    if not rows.exists():
        raise InputError(f"--rows {rows} does not exist; give a JSONL or Parquet file of chats")
    config: RunConfig = parse_config("data: {generator: {rows: 1}}").model_copy(update={"seed": seed})
    # nothing is trained or kept, so the rows need no manifest
    changes = {"generator": None, "sources": [str(rows)], "heldout_share": 0.0, "unlisted_sources": "allow"}
    config.data = config.data.model_copy(update=changes)
    update = {"targets": list(targets) or "all-linear", "batch_size": batch_size, "gradient_accumulation": 1}
    settings = config.train.model_copy(update=update)
    tokenizer = load_tokenizer(directory)
    with tempfile.TemporaryDirectory(prefix="so8t-layers-") as scratch:
        build_dataset(config.data, tokenizer, Path(scratch), seed)
        encoded = EncodedRows(Path(scratch) / "train.jsonl", tokenizer)
    if len(encoded) == 0:
        raise ConfigError(f"--rows {rows} leaves no row to train on")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return rank(load_base(directory), settings, first_rows(settings, encoded, seed), Collator(pad))


def write_plot(places: Sequence[Place], path: Path) -> None:
    """Write an SVG file: layers from left to right, targets from top to bottom; darker means a larger gradient.

    Raises:
        InputError: the file cannot be written.
    """
    layers = sorted({place.layer for place in places})
    targets = list(dict.fromkeys(place.target for place in sorted(places, key=lambda p: p.layer)))
    scores = np.full((len(targets), len(layers)), np.nan)  # (targets, layers); layers of hybrids lack some targets
    for place in places:
        cell = targets.index(place.target), layers.index(place.layer)
        # two modules of one name in a layer, such as experts
        scores[cell] = np.hypot(np.nan_to_num(scores[cell]), place.score)
    options = {"svg.fonttype": "none", "svg.hashsalt": "layers", "font.family": "sans-serif", "font.size": 9}
    with mpl.rc_context(options), atomic_file(path) as temporary:
        figure = Figure(figsize=(2.5 + 0.25 * len(layers), 1.2 + 0.3 * len(targets)), layout="constrained")
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        image = axis.imshow(scores, aspect="auto", cmap="Blues", vmin=0)
        axis.set_yticks(range(len(targets)), targets)
        step = max(1, len(layers) // 16)
        axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axis.set_xlabel("decoder layer")
        figure.colorbar(image, ax=axis, label="gradient, nats per rad")
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
