"""Laws of `so8t data --preview` (the command of docs/data.md): it shows what is trained, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import so8t

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


def test_the_command_shows_counts_and_leaves_no_run_directory(
    tmp_path: Path, tiny_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config(tmp_path).model_dump(mode="json") | {"model": {"base": str(tiny_dir)}}
    (tmp_path / "my.yaml").write_text(json.dumps(content))
    code, out, err = so8t(capfd, monkeypatch, "data", tmp_path / "my.yaml", "--preview", 1, "--quiet")
    assert code == 0, err
    assert "trained | # " in out
    assert "steps and answer disagree: 1" in " ".join(out.split())
    assert "4 rows would be trained on, 1 held out; nothing was written." in " ".join(out.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.yaml", "rows.jsonl"]
