"""Law of survival: a run killed with SIGKILL at any moment ends, started again, with an undisturbed run's artefacts.

A moment is drawn as a step and a share of the time that the step took undisturbed, so that short steps are hit as often
as long ones. After every single kill, whatever stands under its final name is whole and right.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_run import TEXT

from pipeline.config import parse_config
from pipeline.manifest import load_manifest
from pipeline.progress import Reporter
from pipeline.run.steps import STEPS, Run
from pipeline.train.trainer import last_complete_checkpoint
from so8t_core.files import sha256_path

ARTEFACTS = ("data", "adapter/adapter_model.safetensors", "baked", "gguf", "work/answers.json")
MOMENTS = 100
SEEDS = 10


class Started:
    """`so8t run` in a process group of its own; its lines are kept and can be waited for."""

    def __init__(self, config: Path, *options: str) -> None:
        command = [sys.executable, "-m", "pipeline.cli.main", "run", str(config), *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores ctrl-C
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def reaches(self, step: str) -> bool:
        """Wait until the step works; False when the run ended before."""
        mark = f"[{STEPS.index(step)}/"
        with self._news:
            while not any(line.startswith(mark) for line in self.lines):
                if not self._reader.is_alive() or self.process.poll() is not None:
                    return any(line.startswith(mark) for line in self.lines)
                self._news.wait(1)
        return True

    def signal(self, number: int, after: float) -> bool:
        """The signal to the run and to all it started, `after` seconds from now; False when it had ended by itself."""
        try:
            self.process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, number)
        self.end()
        return self.process.returncode != 0

    def end(self) -> int:
        code = self.process.wait(600)
        self._reader.join()
        return code


def _prepare(base: Path, folder: Path, until: str, *overrides: str) -> Path:
    """The configuration, and beside it the artefacts of an undisturbed run."""
    config = folder / "run.yaml"
    text = f"run_dir: {folder / 'run'}\nmodel: {{base: {base}}}\n{TEXT}"
    resolved = parse_config(text, overrides=[*overrides, f"run_dir={folder / 'undisturbed'}"])
    Run(resolved, Reporter(quiet=True)).execute(until=until)
    settings = resolved.model_dump(mode="json") | {"run_dir": str(folder / "run")}
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return config


def _beside(finished: Path, folder: Path, *parts: str, steps: int | None = None) -> Path:
    """As `_prepare`, with parts of a finished run (`conftest.finished`) as the undisturbed one."""
    (folder / "undisturbed").mkdir()
    for part in parts:
        (folder / "undisturbed" / part).symlink_to(finished / part)
    settings = yaml.safe_load((finished / "config.resolved.yaml").read_text(encoding="utf-8"))
    settings["run_dir"] = str(folder / "run")
    settings["train"]["steps"] = steps or settings["train"]["steps"]
    config = folder / "run.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")
    return config


def _assert_like_undisturbed(config: Path, *, all_of_them: bool) -> None:
    for name in ARTEFACTS:
        found, expected = config.parent / "run" / name, config.parent / "undisturbed" / name
        if expected.exists() and (all_of_them or found.exists()):
            assert sha256_path(found) == sha256_path(expected), name


def _ends_undisturbed(config: Path, *options: str) -> Started:
    run = Started(config, *options)
    assert run.end() in (0, 1), run.lines  # 1: the tiny model fails the quality bounds, as it does undisturbed
    _assert_ended_undisturbed(config)
    return run


def _assert_ended_undisturbed(config: Path) -> None:
    _assert_like_undisturbed(config, all_of_them=True)
    run_dir = config.parent / "run"
    assert [p.name for p in run_dir.iterdir() if p.name.endswith((".old", ".tmp"))] == []


def _measured(folder: Path) -> dict[str, Any]:
    """What a report says, without when, where and how fast."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if report["training"] is not None:
        report["training"].pop("seconds")
    for artefact in report["artefacts"]:
        artefact.pop("path")
        if artefact["role"] == "adapter":  # its training.json holds the seconds
            artefact |= {"sha256": "", "bytes": 0}
    return {key: value for key, value in report.items() if key not in ("created", "durations")}


def test_killed_run_ends_like_an_undisturbed_one(finished: tuple[Path, Any], tmp_path: Path) -> None:
    config = _beside(finished[0], tmp_path, "data", "adapter", "baked")
    run = Started(config, "--until", "bake")
    assert run.reaches("train"), run.lines
    assert run.signal(signal.SIGKILL, random.Random(0).uniform(0, 1)), "the run ended before it was killed"
    _assert_like_undisturbed(config, all_of_them=False)
    _ends_undisturbed(config, "--until", "bake")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_ten_moments_over_all_steps_it_still_does(seed: int, tiny_dir: Path, tmp_path: Path) -> None:
    config, moments = _prepare(tiny_dir, tmp_path, "verify", "train.steps=12"), random.Random(seed)
    took = {name: record.seconds for name, record in load_manifest(tmp_path / "undisturbed").steps.items()}
    checkpoints = tmp_path / "run" / "work" / "checkpoints" / "main"
    killed = 0
    for count in range(MOMENTS // SEEDS):
        step = moments.choice(STEPS[1:]) if count < MOMENTS // SEEDS - 1 else "train"
        run = Started(config, "--force", step, "--until", step)  # never up to date
        assert run.reaches(step), run.lines
        killed += run.signal(signal.SIGKILL, moments.uniform(0, took[step]))
        _assert_like_undisturbed(config, all_of_them=False)
    assert killed >= MOMENTS // SEEDS // 2, "most runs ended by themselves: the moments are too late"
    checkpoint = last_complete_checkpoint(checkpoints)
    run = _ends_undisturbed(config, "--force", "train")
    if checkpoint is not None:
        assert any("going on from step" in line for line in run.lines), run.lines
    assert _measured(tmp_path / "run" / "report") == _measured(tmp_path / "undisturbed" / "report")
