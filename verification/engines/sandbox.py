"""Does llama.cpp load this file? Asked in a process of its own, because a damaged file can make llama.cpp abort.

Run as a script it loads the vocabulary, then the whole file (mapped, no weight is read), and prints one JSON object
{"vocabulary": "" or the reason, "model": "" or the reason}. llama.cpp checks every tensor's name and shape against the
architecture while it loads, and says which one it misses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Probe:
    """Why llama.cpp refuses a file; empty texts where it does not."""

    vocabulary: str
    model: str


def probe(path: Path, *, timeout: float = 600.0) -> Probe:
    """Load `path` in a child process; a crash or a hang is a refusal like any other."""
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, str(path)],
            capture_output=True, text=True, errors="replace", timeout=timeout, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Probe("", f"no answer within {timeout:g} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        answer = json.loads(lines[-1])
        return Probe(answer["vocabulary"], answer["model"])
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    words = next((line for line in said if "ASSERT" in line), said[-1] if said else "it said nothing")
    reason = f"llama.cpp crashed ({done.returncode}): {words}"
    # what was printed before the crash says which of the two loads it was
    return Probe("", reason) if lines else Probe(reason, reason)


def require_loadable(path: Path) -> None:
    """Nothing but a file that llama.cpp loads may be opened in this process: a damaged one could end it.

    Raises:
        InputError: with llama.cpp's own reason.
    """
    from so8t_core.errors import InputError  # here: run as a script, this file needs llama_cpp alone

    answer = probe(path)
    if answer.vocabulary or answer.model:
        raise InputError(f"llama.cpp does not load {path}: {answer.vocabulary or answer.model}")


def _main() -> None:
    import llama_cpp

    log: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def remember(level: int, text: bytes, _user: object) -> None:
        if level >= 3:
            log.append(text.decode("utf-8", errors="replace"))

    llama_cpp.llama_log_set(remember, None)
    llama_cpp.llama_backend_init()
    reasons = {}
    for name in ("vocabulary", "model"):
        log.clear()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # no repacking: only whether it loads
        params.vocab_only = name == "vocabulary"
        model = llama_cpp.llama_model_load_from_file(os.fsencode(sys.argv[1]), params)
        words = [line.strip() for line in "".join(log).splitlines() if line.strip(" .")]
        reasons[name] = "" if model else " | ".join(words[-2:]) or "no reason given"
        print(json.dumps({"vocabulary": "", "model": "", **reasons}), flush=True)


if __name__ == "__main__":
    _main()
