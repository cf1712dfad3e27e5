"""A model in several files (shards), `NAME-00001-of-00003.gguf` to `NAME-00003-of-00003.gguf`, read as one set.

llama.cpp opens the first shard, finds the other shards by this pattern of names, and reads metadata from the first
shard only. Each shard states `split.count`, `split.no` (from 0) and `split.tensors.count` (of all shards). The digest
of a set is the SHA-256 of the lines that sha256sum prints for the shards in their order, in their folder:
`sha256sum NAME-*-of-00003.gguf | sha256sum`.
Source: llama.cpp, src/llama-model-loader.cpp and tools/gguf-split.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from so8t_core.errors import InputError
from so8t_core.files import sha256_file

MAX_SHARDS = 1_000  # the largest published sets have about 200
_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_WIDTH = re.compile(r"(blk\.\d+\.(attn_norm|ffn_norm)|output_norm)\.weight")  # one weight a channel in every family


class Shard(Protocol):
    """The part of a `GGUFFile` that this file reads."""

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def get(self, key: str) -> Any:
        """A value of the shard's architecture; None when absent."""


def shard_paths(path: Path) -> list[Path]:
    """The paths of all shards of the set that the file's name belongs to; the path alone if the name is no shard's."""
    found = _NAME.fullmatch(path.name)
    count = int(found["count"]) if found else 1
    if found is None or not 1 < count <= MAX_SHARDS or not 1 <= int(found["number"]) <= count:
        return [path]
    return [path.with_name(f"{found['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def set_stem(path: Path) -> str:
    """The model's name: the file's name without its ending and without a shard's numbers."""
    found = _NAME.fullmatch(path.name)
    return found["name"] if found and len(shard_paths(path)) > 1 else path.stem


def set_digest(paths: Sequence[Path]) -> str:
    """The sha256 of a file, or of a set as the module's docstring defines it."""
    if len(paths) == 1:
        return sha256_file(paths[0])
    lines = "".join(f"{sha256_file(path)}  {path.name}\n" for path in paths)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def set_size(paths: Sequence[Path]) -> int:
    """Bytes of all shards that exist."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def is_shard(metadata: dict[str, Any]) -> bool:
    """Whether the metadata says that the file is one of several shards."""
    return metadata.get("split.count", 0) not in (0, 1)


def siblings(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """All shards of the set that a shard belongs to, in their order, including the shard itself.

    Raises:
        InputError: the file's name is not a shard's name or is another shard's name, or a shard is missing.
    """
    count, number = metadata["split.count"], metadata.get("split.no", 0)
    if count > MAX_SHARDS:
        raise InputError(f"{path} states split.count {count}, at most {MAX_SHARDS} shards are read; it is damaged")
    if number >= count:
        raise InputError(f"{path} states split.no {number}, from 0 and below its split.count {count}; it is damaged")
    found, wanted = _NAME.fullmatch(path.name), f"-{number + 1:05}-of-{count:05}.gguf"
    if found is None:
        raise InputError(
            f"{path} is shard {number + 1} of {count}, but its name does not end in {wanted}, by which llama.cpp finds "
            "the others; give it its name back"
        )
    if int(found["count"]) != count:
        raise InputError(
            f"{path} is a shard of {int(found['count'])} by its name and of {count} by its split.count; "
            "download the set again"
        )
    if int(found["number"]) != number + 1:
        raise InputError(
            f"{path} holds shard {number + 1} of {count} by its split.no: shards changed their names; rename it to "
            f"{found['name']}{wanted}"
        )
    paths = shard_paths(path)
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"{path} is one of {count} shards, and {missing[0]}{more} is missing beside it; fetch it too")
    return paths


def require_one_model(shards: Sequence[Shard]) -> None:
    """Refuse shards that are not one split of one model; `shards` are in order, with names and numbers checked before.

    Raises:
        InputError: another number of tensors than stated, a tensor twice, or a shard of another model.
    """
    first = shards[0]
    for shard in shards:
        _require_same_model(shard, first)
    stated = {m["split.tensors.count"] for m in (shard.metadata for shard in shards) if "split.tensors.count" in m}
    held = sum(len(shard.tensors) for shard in shards)
    where: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in where:
                raise InputError(
                    f"{shard.path} holds {name}, which {where[name].name} holds too: shards of two splits; "
                    "download the set again"
                )
            where[name] = shard.path
    if stated and stated != {held}:
        raise InputError(
            f"{first.path} and its shards state {min(stated)} tensors in all and hold {held}: shards of two splits; "
            "download the set again"
        )


def _require_same_model(shard: Shard, first: Shard) -> None:
    for key, value in shard.metadata.items():
        if key != "split.no" and key in first.metadata and first.metadata[key] != value:
            raise InputError(
                f"{shard.path} has {key} = {_short(value)}, {first.path.name} has {_short(first.metadata[key])}: "
                "shards of two splits or models; download the set again"
            )
    width = first.get("embedding_length")
    for name, tensor in shard.tensors.items():
        if isinstance(width, int) and _WIDTH.fullmatch(name) and tensor.shape != (width,):
            raise InputError(
                f"{shard.path} holds {name} of {tensor.shape[-1]} channels, {first.path.name} states "
                f"{width}: a shard of another model; download the set again"
            )


def require_shard(path: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    """Refuse a file that has a shard's name but is another shard or not a shard.

    Raises:
        InputError: the file is not the shard that its name says.
    """
    if not is_shard(metadata):
        raise InputError(f"{path} is a whole file, not shard {number} of {count}; download the set again")
    siblings(path, metadata)


def only_set(folder: Path) -> Path:
    """The first path of the one model in a folder, without its subfolders.

    Raises:
        InputError: the folder holds no model, or several.
    """
    models = sorted({shard_paths(path)[0] for path in folder.glob("*.gguf")})
    if len(models) == 1:
        return next(path for path in shard_paths(models[0]) if path.is_file())
    names = ", ".join(path.name for path in models[:4])
    found = f"{len(models)} models, of which one is needed: {names}" if models else "no GGUF file"
    raise InputError(f"{folder} holds {found}; name the file, or the first shard of the set")


def _short(value: Any) -> str:
    return repr(value)[:60]
