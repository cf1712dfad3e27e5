"""`so8t convert`: write the baked checkpoint as GGUF files of every wanted type, with Modelfiles, types and model card.

Upstream's converter makes the float types; llama.cpp's quantiser makes all others from the F16 file, so that the
verifier's oracle can repeat them byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from pipeline.base_model import DEMO_NAME, DEMO_NOTE
from pipeline.config import DEMO_MODEL, RunConfig
from pipeline.data.think_form import FORM_KEY, SYSTEM_MESSAGE
from pipeline.progress import Reporter
from pipeline.release.model_card import UNKNOWN_LICENCE, licence_of, model_card
from pipeline.release.modelfile import modelfile
from pipeline.tokenizer import load_tokenizer
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, sha256_file, write_text
from verification.engines.convert import OUT_TYPES, convert, default_name
from verification.engines.quantise import nominal_types, quantise, type_number
from verification.gguf.edit_keys import insert_keys
from verification.gguf.reader import read_gguf
from verification.reference.checkpoint import read_config
from verification.reference.rope import limit_of_config


def released_name(base: str, base_dir: Path) -> str:
    """Name of the released model: the base's name, on which llama.cpp's family switches depend, and "-so8t"."""
    return (DEMO_NAME if base == DEMO_MODEL else default_name(base_dir)) + "-so8t"


def released_n_ctx(config: RunConfig, base_dir: Path) -> int:
    """The context length of the release: `convert.n_ctx`, but never beyond the original length of a LongRoPE."""
    limit = limit_of_config(read_config(base_dir))
    return config.convert.n_ctx if limit is None else min(config.convert.n_ctx, limit)


def convert_model(config: RunConfig, base_dir: Path, baked_dir: Path, out_dir: Path, report: Reporter) -> list[Path]:
    """Write all GGUF files and their companions into `out_dir`, whole or not at all; returns the GGUF files.

    Raises:
        InputError: an unknown type, or a refusal of the converter or the quantiser.
    """
    kinds = list(dict.fromkeys(kind.upper() for kind in config.convert.types))
    for kind in kinds:
        type_number(kind)  # finds an unknown type before any work is done
    name = released_name(config.model.base, base_dir)
    tokenizer = load_tokenizer(baked_dir)
    n_ctx = released_n_ctx(config, base_dir)
    if licence_of(config, base_dir) == UNKNOWN_LICENCE:
        report.note("  the base names no licence: the model card says `unknown`; set convert.licence before publishing")
    if n_ctx < config.convert.n_ctx:
        report.note(
            f"  the Modelfile says num_ctx {n_ctx}, not convert.n_ctx = {config.convert.n_ctx}: above it llama.cpp "
            "takes LongRoPE's long factors for short texts too"
        )
    needs_f16 = any(kind.lower() not in OUT_TYPES for kind in kinds) and "F16" not in kinds
    with atomic_dir(out_dir) as temporary, report.task("converting", len(kinds) + needs_f16) as advance:
        source = temporary / f"{name}-F16.gguf"
        made = []
        order = [*(["F16"] if needs_f16 else []), *kinds]
        for kind in sorted(order, key=lambda kind: kind.lower() not in OUT_TYPES):
            target = temporary / f"{name}-{kind}.gguf"
            if kind.lower() in OUT_TYPES:
                convert(baked_dir, target, outtype=kind.lower(), model_name=name, converter=config.convert.converter)
                insert_keys(target, {FORM_KEY: config.data.think_form})  # the quantiser copies it from the F16 file
            else:
                quantise(source, target, kind, threads=config.threads)
            made.append((kind, target))
            advance(1, info=kind)
        if needs_f16:
            source.unlink()
        files = [target for kind, target in made if kind in kinds]
        for file in files:
            system = SYSTEM_MESSAGE if config.data.think_form == "so8t" else None
            text = modelfile(file.name, baked_dir, tokenizer, n_ctx, system)
            write_text(temporary / f"{file.stem}.Modelfile", text)
        shutil.copyfile(temporary / f"{files[-1].stem}.Modelfile", temporary / "Modelfile")
        write_text(temporary / "types.json", json.dumps({f.name: _types(f) for f in files}, indent=1) + "\n")
        sums = "".join(f"{sha256_file(f)}  {f.name}\n" for f in sorted(files))
        write_text(temporary / "SHA256SUMS", sums)
        notes = [DEMO_NOTE] if config.model.base == DEMO_MODEL else []
        write_text(temporary / "README.md", model_card(config, name, base_dir, [f.name for f in files], n_ctx, notes))
    return [out_dir / file.name for file in files]


def _types(path: Path) -> dict[str, object]:
    """The actual types of a file: the number of tensors of each type, and every fallback by name."""
    rows = nominal_types(read_gguf(path))
    if not rows:
        raise InputError(f"{path} holds no tensors")
    return {
        "counts": dict(sorted(Counter(row.actual for row in rows).items())),
        "fallbacks": {row.name: f"{row.nominal} -> {row.actual}" for row in rows if row.is_fallback},
    }


def gguf_files(out_dir: Path) -> list[Path]:
    """The converted files of a run, float types first, then by size from large to small."""
    files = [out_dir / name for name in json.loads((out_dir / "types.json").read_text(encoding="utf-8"))]
    return sorted(files, key=lambda f: -f.stat().st_size)
