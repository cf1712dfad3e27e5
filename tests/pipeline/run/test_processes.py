"""Laws of a launch of several processes: what is learned and measured does not depend on how many there are.

Two gloo processes on the CPU, started by the commands of docs/scaling_out.md as they stand there. For two, equality is
exact: each micro-batch is computed by the same kernels, a gradient times 2 / 2 is itself, and a sum of two does not
depend on their order. For more, the sum over processes is rounded in another order; what that amounts to is measured
where micro-batches are cut differently (`test_training`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kill import _measured
from test_training import Killed, _die_at, _tensors

from pipeline.config import RunConfig, parse_config
from pipeline.progress import Reporter
from pipeline.run.steps import Run
from pipeline.train.trainer import Order, last_complete_checkpoint, split_step
from so8t_core.errors import InputError
from verification import verify
from verification.engines import distributed
from verification.gate.report import TrainingRecord

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "scaling_out.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^accelerate launch .*", DOCUMENT, re.M)
DDP, FSDP = ("--multi_gpu", "train"), ("--use_fsdp", "train")
TEXT = """
data: {generator: {rows: 22, heldout_rows: 6}}
train:
  steps: 7
  batch_size: 2
  gradient_accumulation: 2
  learning_rate: 5.0e-3
  checkpoint_every: 3
  heldout_rows: 4
  lora: {r: 4, alpha: 8, targets: [q_proj, o_proj]}
"""


def _config(base: Path, run_dir: Path, *overrides: str) -> RunConfig:
    return parse_config(TEXT, overrides=[f"model.base={base}", f"run_dir={run_dir}", *overrides])


def _alone(base: Path, run_dir: Path, *overrides: str) -> Path:
    Run(_config(base, run_dir, *overrides), Reporter(quiet=True)).execute(until="train")
    return run_dir


def _documented(*words: str) -> list[str]:
    """The one command of docs/scaling_out.md that has these words."""
    machines = "--machine_rank" in words
    found = [line for line in COMMANDS if set(words) <= set(line.split()) and ("--machine_rank" in line) == machines]
    (line,) = found
    return line.split()


def _start(command: list[str], folder: Path, *more: str) -> subprocess.Popen[str]:
    """A documented command, as it stands there, in `folder`."""
    if command[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *command[1:], *more]
    else:
        assert command[:2] == ["accelerate", "launch"]
        words = [sys.executable, "-m", "accelerate.commands.launch", *command[2:], *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _launched(config: RunConfig, *words: str) -> subprocess.Popen[str]:
    folder = Path(config.run_dir).parent
    (folder / "my.yaml").write_text(config.model_dump_json(), encoding="utf-8")  # JSON is YAML
    return _start(_documented(*words, "my.yaml"), folder)


def _launch(config: RunConfig, *words: str) -> str:
    """What the finished launch printed."""
    process = _launched(config, *words)
    _, printed = process.communicate(timeout=500)
    assert process.returncode == 0, printed
    return printed


def _assert_same(one: Path, two: Path) -> None:
    expected, found = _tensors(one / "adapter"), _tensors(two / "adapter")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    records = [
        TrainingRecord.model_validate_json((d / "adapter" / "training.json").read_text(encoding="utf-8"))
        for d in (one, two)
    ]
    assert records[0].model_copy(update={"seconds": 0}) == records[1].model_copy(update={"seconds": 0})


@pytest.fixture(scope="module")
def alone(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield _alone(tiny_dir, tmp_path_factory.mktemp("processes") / "one")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("words", [DDP, pytest.param(FSDP, marks=pytest.mark.soak)])
def test_two_processes_finish_what_one_began_as_one_would_have(
    words: tuple[str, ...], alone: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _die_at(5, monkeypatch)
    with pytest.raises(Killed):
        _alone(tiny_dir, tmp_path / "two")
    assert "going on from step 3 of 7" in _launch(_config(tiny_dir, tmp_path / "two"), *words)
    _assert_same(alone, tmp_path / "two")


@pytest.mark.soak
def test_two_processes_learn_what_one_learns(alone: Path, tiny_dir: Path, tmp_path: Path) -> None:
    _launch(_config(tiny_dir, tmp_path / "two"), *DDP)
    _assert_same(alone, tmp_path / "two")


@pytest.mark.soak
@pytest.mark.parametrize("words", [DDP, FSDP])
def test_one_process_goes_on_from_a_launch(words: tuple[str, ...], alone: Path, tiny_dir: Path, tmp_path: Path) -> None:
    main = tmp_path / "two" / "work" / "checkpoints" / "main"
    process = _launched(_config(tiny_dir, tmp_path / "two"), *words)
    while last_complete_checkpoint(main) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    process.communicate()
    _assert_same(alone, _alone(tiny_dir, tmp_path / "two"))


TORCHRUN = "torchrun --nproc_per_node 2"


@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param("accelerate launch", marks=pytest.mark.soak)])
def test_two_processes_verify_what_one_verifies(
    launcher: str, tiny_dir: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both launchers that the page names; accelerate's imports all that training needs, and starts slowly."""
    assert "or with `torchrun`" in DOCUMENT
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(tiny_dir)
    (tmp_path / "my-model-F16.gguf").symlink_to(tiny_gguf)
    verify("./my-model", ["my-model-F16.gguf"], out="one", chunks=3, n_ctx=64, threads=1)
    command = _documented("verify")
    if launcher == TORCHRUN:
        command = [*launcher.split(), *command[command.index("-m") :]]
    process = _start(command, tmp_path, "--chunks", "3", "--n-ctx", "64", "--threads", "1")
    _, printed = process.communicate(timeout=500)
    assert (tmp_path / "report" / "report.json").is_file(), printed
    assert _measured(tmp_path / "one") == _measured(tmp_path / "report")
    assert process.returncode == 1  # too little text to decide: a launcher answers whatever is not 0 with 1


@pytest.mark.soak
def test_two_processes_run_the_whole_road(tiny_dir: Path, tmp_path: Path) -> None:
    """Training on a 4-bit base, bake, files and every leg of verify, with base, adapter and the trained function."""
    more = [
        "threads=1",
        "train.quantization=4bit",
        "train.steps=3",
        "convert.types=[F16, Q8_0]",
        "data.generator.heldout_rows=24",
        "answers={prompts: 2, max_new_tokens: 8}",
        "verify={chunks: 3, n_ctx: 128}",
    ]
    one, two = _config(tiny_dir, tmp_path / "one", *more), _config(tiny_dir, tmp_path / "two", *more)
    Run(one, Reporter(quiet=True)).execute()
    _, printed = _launched(two, "run").communicate(timeout=1000)
    assert (tmp_path / "two" / "report" / "report.json").is_file(), printed
    reports = [_measured(tmp_path / name / "report") for name in ("one", "two")]
    assert reports[0]["trained_function"] is not None
    assert reports[0] == reports[1]


@pytest.mark.soak
def test_two_launchers_are_two_machines(alone: Path, tiny_dir: Path, tmp_path: Path) -> None:
    config = _config(tiny_dir, tmp_path / "two")
    (tmp_path / "my.yaml").write_text(config.model_dump_json(), encoding="utf-8")
    command = ["127.0.0.1" if word == "MAIN" else word for word in _documented("--machine_rank")]
    rank = command.index("--machine_rank") + 1
    launchers = [_start([*command[:rank], number, *command[rank + 1 :]], tmp_path) for number in "01"]
    for launcher in launchers:
        _, printed = launcher.communicate(timeout=500)
        assert launcher.returncode == 0, printed
    _assert_same(alone, tmp_path / "two")


@pytest.mark.parametrize(
    ("size", "accumulation", "processes", "expected"),
    [(4, 1, 1, (4, 1)), (2, 8, 4, (2, 2)), (4, 1, 2, (2, 1)), (2, 3, 2, (1, 3)), (4, 2, 8, (1, 1)), (6, 1, 2, (3, 1))],
)
def test_processes_share_the_rows_of_a_step(
    size: int, accumulation: int, processes: int, expected: tuple[int, int]
) -> None:
    assert split_step(size, accumulation, processes) == expected
    assert expected[0] * expected[1] * processes == size * accumulation


def test_rows_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(InputError, match=r"a step has 6 rows \(.*2 x .*3\), which 4 processes.*multiple of 4"):
        split_step(2, 3, 4)


def test_order_is_one_shuffle_after_another() -> None:
    def order(seed: int) -> list[int]:
        return list(Order([7] * 50, 150, 2, seed))

    taken = Counter(order(3))
    assert set(taken) == set(range(50))
    assert set(taken.values()) == {3}
    assert order(3)[:50] != order(3)[50:100]
    assert order(3) == order(3) != order(4)


def test_rows_of_like_length_learn_together() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 400).tolist()
    order = list(Order(lengths, 400, 4, seed=0))
    steps = [order[first : first + 4] for first in range(0, 400, 4)]
    padded = sum(4 * max(lengths[row] for row in step) for step in steps)
    assert sorted(order) == list(range(400))
    # random steps pad to 1.6 times: the largest of four uniform lengths lies at 0.8 of the range, the mean at 0.5
    assert sum(lengths) < padded < 1.1 * sum(lengths)
    means = [sum(lengths[row] for row in step) for step in steps[:16]]
    assert means != sorted(means), "the steps of a window are shuffled: lengths do not rise through it"


def test_a_process_alone_shares_with_nobody() -> None:
    assert distributed.together(distributed.shared_out(["a", "b"])) == ["a", "b"]
    assert distributed.from_first(lambda: 3) == 3
    distributed.agree("rows", "x")


def test_every_share_is_somebodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    dealt = {}
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        dealt[rank] = distributed.shared_out(list("abcdefg"))
    assert sorted(place for share in dealt.values() for place in share) == list(range(7))


def test_another_view_of_the_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "everyones", lambda value: [value, "other"])
    with pytest.raises(InputError, match=r"process 1 of 1 sees other training rows .* share the run directory"):
        distributed.agree("training rows", "mine")
