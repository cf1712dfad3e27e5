"""Laws of `so8t data --preview` (the command of docs/data.md): it shows what is trained, and writes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.data.preview import preview
from pipeline.data.think_form import format_assistant

ROWS = [{"question": f"{n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(5)]
BAD = {"question": "6 + 1?", "answer": "6 + 1 = 7\n#### 8"}


def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, BAD]))
    data = {"sources": [str(tmp_path / "rows.jsonl")], "unlisted_sources": "allow", "heldout_share": 0.2}
    return RunConfig.model_validate({"run_dir": str(tmp_path / "run"), "data": data})


def test_every_line_of_a_row_is_masked_or_trained_as_the_trainer_masks_it(tmp_path: Path, smollm2: Any) -> None:
    shown, report = preview(config(tmp_path), smollm2, 2)
    assert (len(shown), report.train_rows, report.heldout_rows) == (2, 4, 1)
    lines = shown[0].plain.splitlines()
    trained = [line.removeprefix("trained | ") for line in lines if line.startswith("trained | ")]
    number = int(lines[0].split(":")[1]) - 1
    answer = format_assistant(f"{number} + 1 = {number + 1}", str(number + 1))
    assert "\n".join(trained) == answer + "<|im_end|>"
    assert all(line.startswith((" masked | ", "trained | ")) for line in lines[1:])
    assert {str(span.style) for span in shown[0].spans} >= {"dim", "bold green"}


def test_the_command_shows_counts_and_leaves_no_run_directory(tmp_path: Path) -> None:
    loaded = config(tmp_path)
    (tmp_path / "my.yaml").write_text(json.dumps(loaded.model_dump(mode="json")))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "pipeline.cli.main",
        "data",
        str(tmp_path / "my.yaml"),
        "--preview",
        "1",
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "trained | # " in done.stdout
    assert "steps and answer disagree: 1" in " ".join(done.stdout.split())
    assert "4 rows would be trained on, 1 held out; nothing was written." in " ".join(done.stdout.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.yaml", "rows.jsonl"]
