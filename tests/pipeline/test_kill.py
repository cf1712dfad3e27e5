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


def _start(config: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "run", str(config), "--until", "convert", "--quiet"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _survive(base: Path, folder: Path, moments: list[float]) -> None:
    config = folder / "run.yaml"
    run_dir = folder / "run"
    config.write_text(f"run_dir: {run_dir}\nmodel: {{base: {base}}}\n{TEXT}", encoding="utf-8")
    undisturbed = parse_config(config.read_text(encoding="utf-8"), overrides=[f"run_dir={folder / 'undisturbed'}"])
    Run(undisturbed, Reporter(quiet=True)).execute(until="convert")
    killed = 0
    for moment in moments:
        process = _start(config)
        time.sleep(moment)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 1, "no run was killed: the moments are too late"
    process = _start(config)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    for name in ARTEFACTS:
        assert sha256_path(run_dir / name) == sha256_path(folder / "undisturbed" / name), name
    assert [p.name for p in run_dir.iterdir() if p.name.endswith((".old", ".tmp"))] == []


def test_killed_run_ends_like_an_undisturbed_one(tiny_dir: Path, tmp_path: Path) -> None:
    _survive(tiny_dir, tmp_path, [random.Random(0).uniform(4, 12)])


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_killed_ten_times_it_still_does(seed: int, tiny_dir: Path, tmp_path: Path) -> None:
    moments = random.Random(seed)
    _survive(tiny_dir, tmp_path, [moments.uniform(1, 15) for _ in range(10)])
