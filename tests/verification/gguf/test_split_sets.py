"""A set of shards is one file; shards that are no set are named by what is wrong with them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import I32, Value, with_keys
from gguf_bytes import parts as parts_of
from split_sets import moved, quantise_split, split
from tiny_gguf import write_tiny, write_wide

from so8t_core.errors import InputError
from so8t_core.files import sha256_file
from verification.contract.file_structure import layout
from verification.engines.sandbox import probe
from verification.gguf.reader import read_gguf

U16 = 2


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "whole.gguf")


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> list[Path]:
    return split(whole, tmp_path / "set", stem="m")


def rewritten(path: Path, **keys: Value | None) -> None:
    """The file with keys changed (`split_no` for split.no), or left out where None."""
    with_keys(path, path, {name.replace("_", "."): value for name, value in keys.items()})


def test_every_way_to_name_a_set_gives_the_single_file(whole: Path, shards: list[Path]) -> None:
    assert len(shards) == 3
    alone = read_gguf(whole)
    for given in (*shards, shards[0].parent):
        file = read_gguf(given)
        assert (file.path, file.stem, len(file.shards)) == (shards[0], "m", 3)
        assert list(file.tensors) == list(alone.tensors)
        for name, tensor in alone.tensors.items():
            assert (tensor.type, tensor.shape) == (file.tensors[name].type, file.tensors[name].shape)
            assert np.array_equal(tensor.raw, file.tensors[name].raw)
        assert {k: v for k, v in file.metadata.items() if not k.startswith("split.")} == alone.metadata
        assert layout(file) == []
    found = probe(read_gguf(shards[1]).path)
    assert (found.vocabulary, found.model) == ("", "")


def test_the_digest_of_a_set_is_that_of_sha256sum_and_a_files_stays_its_own(whole: Path, shards: list[Path]) -> None:
    assert read_gguf(whole).digest == sha256_file(whole)
    file = read_gguf(shards[2])
    printed = subprocess.run(
        ["sha256sum", *(path.name for path in shards)], cwd=shards[0].parent, capture_output=True, check=True
    ).stdout
    assert file.digest == hashlib.sha256(printed).hexdigest()
    assert file.size == sum(path.stat().st_size for path in shards)


def test_a_set_that_llama_cpp_quantised_is_read(tmp_path: Path) -> None:
    floats = split(write_wide(tmp_path / "wide.gguf"), tmp_path / "set", tensors=9)
    made = quantise_split(floats[0], tmp_path / "set" / "q.gguf", "Q8_0")
    assert len(made) == len(floats)
    file = read_gguf(made[1])
    assert (file.file_type, set(file.tensors)) == ("Q8_0", set(read_gguf(floats[0]).tensors))


def test_one_of_one_is_an_ordinary_file(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "n-00001-of-00001.gguf"
    shutil.copyfile(whole, path)
    file = read_gguf(path)
    assert (file.digest, file.parts, file.stem) == (sha256_file(whole), (), "n-00001-of-00001")
    rewritten(path, split_no=Value(U16, 0), split_count=Value(U16, 1), split_tensors_count=Value(I32, 21))
    assert read_gguf(path).parts == ()
    named = tmp_path / "n-00001-of-00002.gguf"  # a name alone makes no set
    shutil.copyfile(whole, named)
    assert read_gguf(named).parts == ()


def test_what_is_wrong_with_a_set_is_named(whole: Path, shards: list[Path], tmp_path: Path) -> None:
    first, second, third = (path.name for path in shards)

    def refused(words: str, folder: str, at: int = 0) -> None:
        paths = sorted((tmp_path / folder).glob("*.gguf"))
        with pytest.raises(InputError, match=words):
            read_gguf(paths[at])

    def fresh(folder: str) -> list[Path]:
        return moved(shards, tmp_path / folder, "m")

    fresh("missing")[1].unlink()
    refused(f"one of 3 shards, and {second} is missing beside it", "missing")
    refused(f"one of 3 shards, and {second} is missing beside it", "missing", at=1)
    first_gone = fresh("first gone")
    first_gone[0].unlink()
    refused(f"{first} is missing", "first gone")

    swapped = fresh("swapped")
    swapped[1].rename(tmp_path / "kept")
    swapped[2].rename(swapped[1])
    (tmp_path / "kept").rename(swapped[2])
    refused(f"{second} holds shard 3 of 3 by its split.no.*rename it to {third}", "swapped")
    refused(f"{third} holds shard 2 of 3", "swapped", at=2)

    renamed = fresh("renamed")
    renamed[1].rename(renamed[1].with_name("part-two.gguf"))
    refused("part-two.gguf is shard 2 of 3, but its name does not end in -00002-of-00003.gguf", "renamed", at=2)
    refused(f"{second} is missing", "renamed")

    counts = fresh("counts")
    rewritten(counts[1], split_count=Value(U16, 2))
    refused("a shard of 3 by its name and of 2 by its split.count", "counts")
    others = fresh("others")
    rewritten(others[2], split_tensors_count=Value(I32, 22))
    refused("split.tensors.count = 22, .* has 21", "others")
    wrong = fresh("wrong")
    for path in wrong:
        rewritten(path, split_tensors_count=Value(I32, 22))
    refused("state 22 tensors in all and hold 21", "wrong")

    shutil.copyfile(whole, fresh("whole")[1])
    refused(f"{second} is a whole file, not shard 2 of 3", "whole")
    stale = fresh("twice")
    parts = parts_of(stale[1])
    parts.tensors |= {"output_norm.weight": parts_of(stale[0]).tensors["output_norm.weight"]}
    parts.write(stale[1])
    refused("holds output_norm.weight, which .* holds too", "twice")

    cat = tmp_path / "cat"
    cat.mkdir()
    (cat / "m.gguf").write_bytes(b"".join(path.read_bytes() for path in shards))
    refused("holds several shards one behind the other.*gguf-split --merge", "cat")


def test_a_shard_of_another_model_is_named(shards: list[Path], tmp_path: Path) -> None:
    wide = split(write_wide(tmp_path / "wide.gguf"), tmp_path / "wide", stem="w")
    paths = moved(shards, tmp_path / "mixed", "m")
    shutil.copyfile(wide[2], paths[2])
    with pytest.raises(InputError, match=r"of 256 channels, m-00001-of-00003.gguf states 32: a shard of another model"):
        read_gguf(paths[0])
    other = moved(shards, tmp_path / "family", "m")
    rewritten(other[1], general_architecture=Value(8, "qwen2"))
    with pytest.raises(InputError, match=r"general.architecture = 'qwen2', m-00001-of-00003.gguf has 'llama'"):
        read_gguf(other[2])


def test_a_folder_is_one_model_or_refused(shards: list[Path], whole: Path, tmp_path: Path) -> None:
    folder = shards[0].parent
    moved(shards, folder, "n")
    with pytest.raises(InputError, match=r"holds 2 models.*m-00001-of-00003.gguf, n-00001-of-00003.gguf"):
        read_gguf(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no GGUF file"):
        read_gguf(empty)
    shutil.copyfile(whole, empty / "one.gguf")
    assert read_gguf(empty).path.name == "one.gguf"


def test_a_set_of_absurd_size_is_refused_before_its_shards_are_sought(shards: list[Path]) -> None:
    for count, words in ((60_000, "at most 1000 shards"), (2, "split.no 2, from 0 and below")):
        rewritten(shards[2], split_count=Value(U16, count))
        with pytest.raises(InputError, match=words):
            read_gguf(shards[2])
