"""Upstream's converter, which gives the file that it gave before where checkpoint and options are the same.

Most conversions in the tests are of a few small models, again and again, and each takes five seconds, most of them
spent on imports. `remembering(folder)` makes a directory that can stand for the converter's: its modules, and in the
place of its script this file. As a script it looks for what it was asked for (the checkpoint's bytes and its name, the
options) beside itself, and else starts the real script and keeps what that wrote. A conversion that fails is not kept.
While `warm(folder)` lasts, in any worker, the real script is a fork of a process that has imported what it imports.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SCRIPT = "convert_hf_to_gguf.py"
REAL, KEPT, WARM = "real.txt", "kept", ".warm.json"


def remembering(folder: Path) -> None:
    """Write the directory; its converter is the one that is in use now."""
    from verification.engines.convert import find_converter

    home = find_converter()
    for part in home.iterdir():
        if part.name != SCRIPT:
            (folder / part.name).symlink_to(part)
    shutil.copyfile(__file__, folder / SCRIPT)
    (folder / REAL).write_text(str(home / SCRIPT), encoding="utf-8")


@contextlib.contextmanager
def in_use(home: Path) -> Iterator[None]:
    """Conversions of this process and of those that it starts are made by `home`."""
    before = os.environ.get("SO8T_CONVERTER")
    os.environ["SO8T_CONVERTER"] = str(home)
    try:
        yield
    finally:
        del os.environ["SO8T_CONVERTER"]
        if before is not None:
            os.environ["SO8T_CONVERTER"] = before


def key_of(checkpoint: Path, options: list[str]) -> str:
    """Digest of all that decides the converter's file: the directory's name and files, and the options."""
    digest = hashlib.sha256(repr((checkpoint.name, options)).encode())
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(repr((path.relative_to(checkpoint).as_posix(), content)).encode())
    return digest.hexdigest()


def _store(home: Path) -> Path:
    return home.with_name(f"{home.name}-{KEPT}")


@contextlib.contextmanager
def warm(home: Path) -> Iterator[None]:
    """A process of this worker that has imported the real script, for whatever `home` does not remember."""
    from warm_programs import Warm

    from verification.engines.convert import _environment

    script = (home / REAL).read_text(encoding="utf-8")
    process = Warm(script, _environment(Path(script).parent))
    _store(home).mkdir(exist_ok=True)
    place = _store(home) / f"{os.getpid()}{WARM}"
    place.write_text(json.dumps([str(process.socket), process.words()]), encoding="utf-8")
    yield
    place.unlink()
    process.close()


def _warm_words(home: Path) -> list[str] | None:
    """The command line of a warm process that answers."""
    for place in _store(home).glob(f"*{WARM}"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            address, words = json.loads(place.read_text(encoding="utf-8"))
            connection.connect(address)
            return list(words)
    return None


def main() -> int:
    """The converter's own command line: DIRECTORY --outfile FILE OPTIONS."""
    home, (given, flag, out, *options) = Path(__file__).parent, sys.argv[1:]
    assert flag == "--outfile", sys.argv
    kept = _store(home) / f"{key_of(Path(given), options)}.gguf"
    if kept.is_file():
        shutil.copyfile(kept, out)
        return 0
    words = _warm_words(home)
    if words is None or subprocess.run([*words, *sys.argv[1:]], capture_output=True).returncode != 0:
        cold = [sys.executable, (home / REAL).read_text(encoding="utf-8")]
        if (code := subprocess.run([*cold, *sys.argv[1:]]).returncode) != 0:
            return code if code > 0 else 128 - code
    if Path(out).is_file():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as part:
            shutil.copyfile(out, part.name)
        os.replace(part.name, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
