"""Law of survival: a run killed with SIGKILL at any moment ends, started again, with an undisturbed run's artefacts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import TEXT

from pipeline.config import parse_config
from pipeline.progress import Reporter
from pipeline.run import Run
from so8t_core.files import sha256_path

ARTEFACTS = ("data", "adapter/adapter_model.safetensors", "baked", "gguf")


def _start(config: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "run", str(config), "--until", "convert", "--quiet", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """SIGKILL to the run and all it started; False when it had ended by itself."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def _prepare(base: Path, folder: Path) -> Path:
    """The configuration, and beside it the artefacts of an undisturbed run."""
    config = folder / "run.yaml"
    config.write_text(f"run_dir: {folder / 'run'}\nmodel: {{base: {base}}}\n{TEXT}", encoding="utf-8")
    undisturbed = parse_config(config.read_text(encoding="utf-8"), overrides=[f"run_dir={folder / 'undisturbed'}"])
    Run(undisturbed, Reporter(quiet=True)).execute(until="convert")
    return config


def _ends_undisturbed(config: Path) -> None:
    process = _start(config)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    run_dir = config.parent / "run"
    for name in ARTEFACTS:
        assert sha256_path(run_dir / name) == sha256_path(config.parent / "undisturbed" / name), name
    assert [p.name for p in run_dir.iterdir() if p.name.endswith((".old", ".tmp"))] == []


def test_killed_run_ends_like_an_undisturbed_one(tiny_dir: Path, tmp_path: Path) -> None:
    config = _prepare(tiny_dir, tmp_path)
    process = _start(config)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "data").exists():  # from here on it loads the model and trains
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(random.Random(0).uniform(0, 1))
    assert _kill(process), "the run ended before it was killed"
    _ends_undisturbed(config)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_killed_ten_times_it_still_does(seed: int, tiny_dir: Path, tmp_path: Path) -> None:
    config, moments = _prepare(tiny_dir, tmp_path), random.Random(seed)
    killed = 0
    for _ in range(10):
        process = _start(config, "--from", moments.choice(["data", "train", "bake", "convert"]))  # never up to date
        time.sleep(moments.uniform(1, 10))
        killed += _kill(process)
    assert killed >= 1, "no run was killed: the moments are too late"
    _ends_undisturbed(config)
