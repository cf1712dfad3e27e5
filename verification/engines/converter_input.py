"""The directory that upstream's converter reads: a checkpoint's data and weight files, without its code.

The converter loads tokenizers with `trust_remote_code=True`. So it gets a temporary directory with the checkpoint's
name (general.basename comes from the name). The directory holds links to the weight files (`weight_files`), under the
names and with the index that the converter expects, and to data files, chosen by their endings. It holds no Python
files and no pickles. `auto_map` is removed from every JSON file, and local paths of this machine are removed from
config.json and the model card.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from so8t_core.checkpoint_admission import admit_checkpoint
from so8t_core.files import MAX_JSON
from so8t_core.weight_files import INDEX, SINGLE, WeightFiles
from verification.reference.config_forms import for_converter

_DATA = frozenset({".json", ".jsonl", ".jinja", ".model", ".txt", ".md", ".tiktoken", ".vocab", ".bpe"})
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json"})  # large, and no program reads class names from them
_LOCAL = re.compile(r"(file:|[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\])")
_FRONT = re.compile(r"---\n(.*?\n)---(\n|$)", re.DOTALL)


@contextmanager
def converter_input(checkpoint: Path) -> Iterator[tuple[Path, WeightFiles, list[str]]]:
    """(directory for the converter, the weight files it links to, notes on the checkpoint).

    Raises:
        InputError: the checkpoint is refused, see `admit_checkpoint`.
    """
    weights, notes = admit_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory(prefix="so8t-convert-") as scratch:
        directory = Path(scratch) / (Path(os.path.abspath(checkpoint)).name or "model")
        directory.mkdir()
        _link_weights(weights, directory)
        for source in _data_files(checkpoint):
            target = directory / source.relative_to(checkpoint)
            target.parent.mkdir(exist_ok=True)
            changed = _without_code(source) if source.suffix == ".json" else None
            if source.name == "README.md":
                changed = _without_paths(source)
            if changed is None:
                target.symlink_to(source.resolve())
            elif changed:
                target.write_text(changed, encoding="utf-8")
        yield directory, weights, notes


def _link_weights(weights: WeightFiles, directory: Path) -> None:
    names = [SINGLE]
    if len(weights.names) > 1:
        total = len(weights.names)
        names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        given = dict(zip(weights.paths, names, strict=True))
        weight_map = {tensor: given[path] for tensor, path in weights.file_of.items()}
        size = sum(entry.nbytes for entry in weights.entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")
    for name, path in zip(names, weights.paths, strict=True):
        (directory / name).symlink_to(path.resolve())


def _data_files(checkpoint: Path) -> Iterator[Path]:
    """Data files in the directory and its subfolders (templates, pooling); no hidden files and no weight index."""
    for path in sorted([*checkpoint.glob("*"), *checkpoint.glob("*/*")]):
        relative = path.relative_to(checkpoint)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix in _DATA and not hidden and not path.name.endswith(".index.json") and path.is_file():
            yield path


def _without_code(path: Path) -> str | None:
    """JSON text without the keys that name code; None if the file can be linked, empty if it must be left out."""
    if path.name in _VOCABULARIES:
        return None
    if path.stat().st_size > MAX_JSON:
        return ""
    try:
        value = json.loads(path.read_bytes())
        changed = _scrubbed(value)
    except (ValueError, RecursionError):
        return ""  # the converter and transformers use the same parser, so they could not read the file either
    if isinstance(changed, dict) and path.name == "config.json":
        for key in ("_name_or_path", "_model_name_or_path"):
            if isinstance(changed.get(key), str):
                changed[key] = _without_path(changed[key])
        changed = for_converter(changed)
    return None if changed == value else json.dumps(changed, ensure_ascii=False)


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(inner) for key, inner in value.items() if key not in _CODE_KEYS}
    return [_scrubbed(inner) for inner in value] if isinstance(value, list) else value


def _without_paths(card: Path) -> str | None:
    """A model card with local paths in its header cut to their last part; None if there are none."""
    try:
        text = card.read_text(encoding="utf-8")
        found = _FRONT.match(text)
        header = yaml.safe_load(found[1].replace("- no\n", '- "no"\n').replace("\t", "  ")) if found else None
        changed = _cut_paths(header)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return ""
    if found is None or changed == header:
        return None
    return f"---\n{yaml.safe_dump(changed, allow_unicode=True, sort_keys=False)}---\n{text[found.end() :]}"


def _cut_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cut_paths(inner) for inner in value]
    return _without_path(value) if isinstance(value, str) else value


def _without_path(value: str) -> str:
    """The last part of a path of this machine; any other text unchanged."""
    try:
        local = _LOCAL.match(value) is not None or ("/" in value and Path(value).exists())
    except (OSError, ValueError):
        local = False
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if local else value
