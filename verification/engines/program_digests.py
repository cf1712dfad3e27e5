"""Digests of the programs that make files: a version number does not identify a program, its bytes do.

The converter's digest covers its Python files (script, `conversion`, `gguf`), llama.cpp's digest the libraries of
llama-cpp-python. Hashing takes about 0.01 s and 0.1 s, once a process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

from so8t_core.files import sha256_file

SCRIPT = "convert_hf_to_gguf.py"
_PACKAGES = ("conversion", "gguf", "gguf-py/gguf")
_OWN = ("convert.py", "converter_input.py", "quantise.py", "stop_keys.py")
_READERS = ("transformers", "tokenizers", "sentencepiece", "torch", "numpy", "llama-cpp-python")


def converter_digest(home: Path) -> str:
    """sha256 over the converter's Python files and their names, relative to its directory."""
    files = [home / SCRIPT, *(path for name in _PACKAGES for path in (home / name).rglob("*.py"))]
    return _digest(home, files)


def llama_digest() -> str:
    """sha256 over llama.cpp's libraries that are installed with llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "not installed"
    folder = Path(spec.origin).parent / "lib"
    found = {path.resolve() for path in folder.rglob("*") if path.is_file() and _is_library(path.name)}
    return _digest(folder.resolve(), sorted(found))


def makers_digest(home: Path) -> str:
    """sha256 over everything that decides a converted or quantised file's bytes, except the checkpoint."""
    here = Path(__file__).parent
    parts = [converter_digest(home), llama_digest(), _digest(here, [here / name for name in _OWN])]
    parts += [f"{name} {_version(name)}" for name in _READERS]
    return hashlib.sha256("\n".join([*parts, platform.machine()]).encode()).hexdigest()


def _digest(root: Path, files: list[Path]) -> str:
    lines = "".join(f"{_sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in sorted(set(files)))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    return sha256_file(path) if path.is_file() else "absent"


def _is_library(name: str) -> bool:
    return name.endswith((".dylib", ".dll")) or ".so" in name


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
