"""A folder as the candidate: which of its files are models, and a stopped run that measures only what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from split_sets import split
from tiny_gguf import write_tiny
from verification_models import Family

from so8t_core.errors import InputError
from verification import verify
from verification.commands.repository import candidates_of


def test_models_are_judged_and_the_other_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    write_tiny(tmp_path / "b.gguf")
    write_tiny(tmp_path / "deeper" / "a.gguf")
    split(write_tiny(tmp_path / "whole"), tmp_path / "deeper", stem="set")
    (tmp_path / "whole").unlink()
    found = candidates_of([tmp_path])
    assert [file.path.name for file in found.files] == ["b.gguf", "a.gguf", "set-00001-of-00003.gguf"]
    second = tmp_path / "deeper" / "set-00002-of-00003.gguf"
    assert len(candidates_of([second, second.with_name("set-00003-of-00003.gguf")]).files) == 1


def test_a_set_without_one_shard_is_refused_by_its_name(tmp_path: Path) -> None:
    split(write_tiny(tmp_path / "whole"), tmp_path / "set", stem="m")[1].unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf is missing"):
        candidates_of([tmp_path / "set"])


def test_a_file_is_a_model_by_its_tensors_and_never_by_its_name(tmp_path: Path) -> None:
    write_tiny(tmp_path / "mmproj-model.gguf")
    assert len(candidates_of([tmp_path]).files) == 1


def test_a_folder_without_a_model_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no GGUF file of a model"):
        candidates_of([tmp_path])
    path = write_tiny(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        candidates_of([tmp_path])


def test_a_stopped_run_goes_on_without_the_reference(family: Family, tmp_path: Path) -> None:
    """Stopped behind the last file's logits, the second run opens neither the reference nor a file for its logits."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for kind in ("F16", "Q8_0"):
        shutil.copyfile(family.files[kind], repository / family.files[kind].name)
    asked: dict[str, Any] = {"chunks": 2, "n_ctx": 64, "threads": 1, "work_dir": family.work, "out": tmp_path / "out"}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "noise floor":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(family.reference, [repository], progress=stop, **asked)
    assert len(list((tmp_path / "out" / "measured").iterdir())) == 5  # files and logits twice, Q8_0's paired outcome
    stages: list[str] = []
    report = verify(family.reference, [repository], progress=lambda stage, done, total: stages.append(stage), **asked)
    assert not {"reference", "F16", "Q8_0", "files"} & set(stages)
    assert not (tmp_path / "out" / "measured").exists()
    assert {d.candidate for d in report.divergences} == {"F16", "Q8_0"}
    assert {row.candidate for row in report.tensors} == {"F16", "Q8_0"}
    assert not [c for leg in report.legs for c in leg.checks if c.name.endswith(".complete")]
    table = (tmp_path / "out" / "model_card.md").read_text(encoding="utf-8")
    assert table.count("\n| m-") == 2
    assert "| m-Q8_0.gguf | Q8_0 |" in table
