"""Find the weight files of a checkpoint directory: those that transformers would load, and no others.

The order of transformers 5.23: the file that config.json names as `transformers_weights`; model.safetensors; the files
that model.safetensors.index.json names. Where two files hold the same tensor, the file that comes later by name counts.
An index only names files: a tensor in a named file is loaded even if the index leaves it out. Pickled weights
(pytorch_model.bin) are never opened.
Source: transformers, modeling_utils.py, `_get_resolved_checkpoint_files`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from so8t_core.errors import InputError, one_line
from so8t_core.files import read_json
from so8t_core.safetensors_header import MAX_TENSORS, Entry, read_entries

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PER_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # transformers would prefer these


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one model and their tensors."""

    directory: Path
    names: tuple[str, ...]  # in the order in which transformers reads them
    entries: dict[str, Entry]  # by tensor name; where two files hold it, from the file that counts
    file_of: dict[str, Path]  # by tensor name
    notes: tuple[str, ...]  # a sentence for each file outside the model and each tensor in two files

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files in the order of `names`."""
        return tuple(self.directory / name for name in self.names)


def weight_files(directory: str | Path) -> WeightFiles:
    """The weight files that transformers would load from a directory, with their tensors.

    Raises:
        InputError: no safetensors; a file that is missing, damaged, or outside the directory (the blobs of the hub's
            cache excepted); an index that is damaged, too large, or names a tensor that no file holds.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"checkpoint {directory} is not a directory")
    names, promised = _names(directory)
    for name in names:
        _check_place(directory, name)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        count = f"{len(missing)} of {len(names)} weight files are missing, first {missing[0]}"
        raise InputError(f"{directory}: {count}; copy the whole checkpoint again")
    entries: dict[str, Entry] = {}
    file_of: dict[str, Path] = {}
    twice: list[str] = []
    for name in names:
        for entry in read_entries(directory / name):
            twice += [entry.name] if entry.name in entries else []
            entries[entry.name], file_of[entry.name] = entry, directory / name
    lost = sorted(promised - entries.keys())
    if lost:
        raise InputError(
            f"{directory / INDEX} names {lost[0]}, which no file holds ({len(lost)} such tensors); transformers would "
            "invent their values: copy the whole checkpoint again"
        )
    return WeightFiles(directory, names, entries, file_of, tuple(_notes(directory, names, twice, file_of)))


def _names(directory: Path) -> tuple[tuple[str, ...], set[str]]:
    """(file names, tensors that an index promises)."""
    config = directory / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    if named is not None and not isinstance(named, str):
        raise InputError(f"{config}: transformers_weights is {str(named)[:80]!r}, wanted the name of a weight file")
    present = sorted(os.listdir(directory))
    per_rank = next((name for name in present if _PER_RANK.fullmatch(name)), None)
    if per_rank is not None:
        raise InputError(f"{directory} holds {per_rank}, one process's share; save the whole with save_pretrained")
    first = named or (SINGLE if (directory / SINGLE).is_file() or not (directory / INDEX).is_file() else INDEX)
    if first.endswith(".index.json"):
        _check_place(directory, first)
        return _indexed(directory / first)
    if named is None and SINGLE not in present:
        pickled = [name for name in present if name.endswith(_PICKLED)]
        found = f"only {pickled[0]}, which is never unpickled here" if pickled else "neither one file nor an index"
        raise InputError(f"{directory} holds no {SINGLE}: {found}; save the model with save_pretrained (safetensors)")
    return (first,), set()


def _indexed(index: Path) -> tuple[tuple[str, ...], set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} is damaged: it has no weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise InputError(f"{index} names {len(weight_map)} tensors, at most {MAX_TENSORS} are read")
    odd = [value for value in weight_map.values() if not isinstance(value, str)]
    if odd:
        raise InputError(f"{index} is damaged: weight_map holds {str(odd[0])[:80]!r}, wanted file names")
    return tuple(sorted(set(weight_map.values()))), set(weight_map)


def _check_place(directory: Path, name: str) -> None:
    """Refuse a name that is no safetensors file (or index) inside the directory, symlinks followed."""
    shown = repr(name[:120])
    if not name.endswith((".safetensors", ".index.json")) or not name.isprintable() or len(name.encode()) > 255:
        raise InputError(f"{directory}: {shown} is named as a weight file, but only *.safetensors files are read")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{directory}: the weight file {shown} lies outside the directory; put it there")
    try:
        inside, target = directory.resolve(), (directory / name).resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise InputError(f"{directory}: {shown} cannot be followed: {one_line(error)}") from None
    blobs = inside.parent.parent / "blobs"  # of the hub's cache: models--x/snapshots/revision/name -> blobs/digest
    if not target.is_relative_to(inside) and not (inside.parent.name == "snapshots" and target.is_relative_to(blobs)):
        raise InputError(f"{directory}: {shown} is a link to {target}, outside the directory; copy the file there")


def _notes(directory: Path, names: tuple[str, ...], twice: list[str], file_of: dict[str, Path]) -> Iterable[str]:
    used = set(names)
    stale = sorted(p.name for p in directory.iterdir() if p.suffix == ".safetensors" and p.name not in used)
    if stale:
        more = f" and {len(stale) - 1} more files" * (len(stale) > 1)
        yield f"not loaded by transformers, so no part of the model: {stale[0]}{more}"
    if (directory / INDEX).is_file() and names == (SINGLE,):
        yield f"{INDEX} is not used: {SINGLE} stands beside it"
    if twice:
        yield f"{twice[0]} stands in several files; transformers takes it from {file_of[twice[0]].name}" + (
            f" ({len(twice)} such tensors)" if len(twice) > 1 else ""
        )
