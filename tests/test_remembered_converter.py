"""The converter of the tests gives a file again only where all that decides its bytes is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from remembered_converter import SCRIPT, in_use, remembering, warm

from verification.engines.convert import find_converter

STUB = """
import builtins
import sys
from pathlib import Path

if __name__ != "__main__":
    builtins.imported_before = True
else:
    given, _, out, *options = sys.argv[1:]
    with open(Path(__file__).parent / "calls", "a") as calls:
        calls.write("warm " if hasattr(builtins, "imported_before") else "cold ")
    if (Path(given) / "bad").exists():
        sys.exit("it is bad")
    Path(out).write_text(f"{(Path(given) / 'model').read_text()} {options}")
"""


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose converter counts its calls."""
    home = tmp_path / "real"
    (home / "conversion").mkdir(parents=True)
    (home / "conversion" / "base.py").write_text("")
    (home / SCRIPT).write_text(STUB)
    monkeypatch.setenv("SO8T_CONVERTER", str(home))
    return home


@pytest.fixture
def remembered(real: Path, tmp_path: Path) -> Path:
    home = tmp_path / "remembered"
    home.mkdir()
    remembering(home)
    return home


def convert(home: Path, given: Path, *options: str) -> str:
    out = given.parent / "out"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(home / SCRIPT), str(given), "--outfile", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return out.read_text() if done.returncode == 0 else done.stderr.strip()


def test_only_what_is_asked_again_is_remembered(real: Path, remembered: Path, tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for folder in (model, other):
        folder.mkdir()
        (folder / "model").write_text("a")

    def calls() -> int:
        return len((real / "calls").read_text().split())

    assert convert(remembered, model, "--outtype", "f16") == "a ['--outtype', 'f16']"
    assert convert(remembered, model, "--outtype", "f16") == "a ['--outtype', 'f16']"
    assert calls() == 1
    assert convert(remembered, model, "--outtype", "f32") == "a ['--outtype', 'f32']"
    assert convert(remembered, other, "--outtype", "f16") == "a ['--outtype', 'f16']"
    assert calls() == 3  # other options; another name, which goes into the file
    (model / "model").write_text("b")
    assert convert(remembered, model, "--outtype", "f16") == "b ['--outtype', 'f16']"
    (model / "more").touch()
    convert(remembered, model, "--outtype", "f16")
    assert calls() == 5
    (model / "bad").touch()
    for count in (6, 7):
        assert convert(remembered, model, "--outtype", "f16") == "it is bad"
        assert calls() == count


def test_it_stands_for_the_converter_while_it_is_in_use(real: Path, remembered: Path) -> None:
    with in_use(remembered):
        assert find_converter() == remembered
        assert (remembered / "conversion" / "base.py").is_file()
    assert find_converter() == real


def test_what_is_not_remembered_is_made_by_a_warm_process_while_there_is_one(
    real: Path, remembered: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model").write_text("a")
    with warm(remembered):
        assert convert(remembered, model, "1") == convert(remembered, model, "1") == "a ['1']"
        assert (real / "calls").read_text() == "warm "
        (model / "bad").touch()
        assert convert(remembered, model, "1") == "it is bad"
        assert (real / "calls").read_text() == "warm warm cold "  # what fails is said by an ordinary start
        (model / "bad").unlink()
    assert convert(remembered, model, "2") == "a ['2']"
    assert (real / "calls").read_text().split()[-1] == "cold"
