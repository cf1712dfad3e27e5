"""What tests share is made once a run, whole or not at all, and changed by nobody."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from made import Made


def slow(folder: Path, word: str) -> None:
    (folder.parent / f"calls-{time.monotonic_ns()}").touch()
    time.sleep(0.2)
    (folder / "word").write_text(word)


def fails_once(folder: Path, memory: Path) -> None:
    (folder / "half").touch()
    if not memory.exists():
        memory.touch()
        raise OSError("the first time")
    (folder / "whole").touch()


def test_workers_that_ask_at_once_get_one_making(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as workers:
        found = list(workers.map(lambda _: Made(tmp_path)(slow, "a"), range(4)))
    assert len(set(found)) == 1
    assert (found[0] / "word").read_text() == "a"
    assert len(list(tmp_path.glob("calls-*"))) == 1


def test_other_arguments_are_another_folder(tmp_path: Path) -> None:
    made = Made(tmp_path)
    assert [(made(slow, word) / "word").read_text() for word in "aba"] == ["a", "b", "a"]
    assert len(list(tmp_path.glob("calls-*"))) == 2


def test_a_maker_that_fails_leaves_nothing_that_counts(tmp_path: Path) -> None:
    made = Made(tmp_path / "made")
    with pytest.raises(OSError, match="the first time"):
        made(fails_once, tmp_path / "memory")
    (tmp_path / "made" / "half").touch()
    assert [path.name for path in sorted(made(fails_once, tmp_path / "memory").iterdir())] == ["half", "whole"]


def test_a_function_without_a_name_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no function of a module"):
        Made(tmp_path)(lambda folder: None)


@pytest.mark.parametrize("change", ["written", "added", "removed"])
def test_a_changed_folder_is_found(tmp_path: Path, change: str) -> None:
    made = Made(tmp_path)
    made(slow, "untouched")
    assert made.changed() == []
    folder = made(slow, "a")
    if change == "removed":
        (folder / "word").unlink()
    else:
        (folder / ("word" if change == "written" else "more")).write_text("b")
    assert made.changed() == [folder.name]
