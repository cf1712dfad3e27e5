"""Launches of real processes (gloo, on this machine): who is first, what is shared, what they must agree on."""

from __future__ import annotations

import atexit
import os
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from so8t_core.errors import InputError
from verification.engines import distributed

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def launch(count: int, work: Callable[[], Any], **more: str) -> list[Any]:
    """What `work` gives, or raises, in each of `count` processes started as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for number in range(count):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.environ.update({"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": str(number), **more})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            try:
                answer = work()
            except BaseException as error:
                answer = error
            os.write(write, pickle.dumps(answer))
            os._exit(0)
        os.close(write)
        children.append((child, read))
    answers = []
    for child, read in children:
        with os.fdopen(read, "rb") as stream:
            answers.append(pickle.loads(stream.read()))
        os.waitpid(child, 0)
    return answers


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_variables(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("variables", "count", "rank", "local"),
    [
        ({}, 1, 0, 0),
        ({"RANK": 5, "LOCAL_RANK": 3}, 1, 0, 0),  # without WORLD_SIZE there is no other process
        ({"WORLD_SIZE": 1, "RANK": 5, "LOCAL_RANK": 3}, 1, 0, 0),
        ({"WORLD_SIZE": 2}, 2, 0, 0),
        ({"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}, 2, 1, 1),
        ({"WORLD_SIZE": 16, "RANK": 15, "LOCAL_RANK": 7}, 16, 15, 7),
        ({"WORLD_SIZE": 999_999_999, "RANK": 999_999_998}, 999_999_999, 999_999_998, 0),
    ],
)
def test_the_launchers_variables_say_who_this_is(
    variables: dict[str, int], count: int, rank: int, local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, **variables)
    assert (distributed.count(), distributed.rank(), distributed.local_rank()) == (count, rank, local)
    assert distributed.is_first() is (rank == 0)


@pytest.mark.parametrize("text", ["", " 2", "2.0", "-2", "+2", "1_0", "two", "\u0662", "\u00b2", "1" * 10, "0x2"])
def test_a_number_of_processes_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, WORLD_SIZE=text)
    with pytest.raises(InputError) as refused:
        distributed.count()
    assert str(refused.value) == (
        f"the environment variable WORLD_SIZE is {text!r}, a whole number from 1 on is expected; "
        "unset it, or start the command with `accelerate launch`"
    )


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_a_number_of_a_process_that_is_none_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, WORLD_SIZE=2, **{variable: "x"})
    with pytest.raises(InputError, match=rf"variable {variable} is 'x', a whole number from 0 on is expected"):
        distributed.rank() if variable == "RANK" else distributed.local_rank()


def test_a_process_beyond_the_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, WORLD_SIZE=2, RANK=2)
    with pytest.raises(InputError) as refused:
        distributed.rank()
    assert str(refused.value) == (
        "RANK=2 is not below WORLD_SIZE=2; unset both, or start the command with `accelerate launch`"
    )


def test_one_process_alone_answers_at_once() -> None:
    import torch.distributed as dist

    distributed.join()
    distributed.wait()
    distributed.agree("inputs", "a")
    assert distributed.from_first(lambda: 7) == 7
    assert distributed.everyones("x") == ["x"]
    assert distributed.together(distributed.shared_out("abc")) == ["a", "b", "c"]
    assert not dist.is_initialized()


def test_the_threads_of_a_machine_are_shared_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, LOCAL_WORLD_SIZE=4)
    assert distributed.threads_each(10) == 10  # no launch: whatever the variable says
    set_variables(monkeypatch, WORLD_SIZE=2)
    assert distributed.threads_each(8) == 2
    set_variables(monkeypatch, WORLD_SIZE=8)
    assert [distributed.threads_each(cores) for cores in (10, 8, 4, 3, 1)] == [2, 2, 1, 1, 1]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert distributed.threads_each(10) == 10
    set_variables(monkeypatch, LOCAL_WORLD_SIZE=0)
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE is '0', a whole number from 1 on"):
        distributed.threads_each(10)


@pytest.mark.parametrize("gpus", [True, False])
def test_each_process_takes_its_own_gpu_where_there_are_some(gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine without GPUs can show: the calls that `join` makes of torch."""
    import torch
    import torch.distributed as dist

    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: called.append(("device", number)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: called.append((backend, timeout.days > 7)))
    monkeypatch.setattr(atexit, "register", lambda leave: called.append(("at the end", leave)))
    set_variables(monkeypatch, WORLD_SIZE=8, RANK=6, LOCAL_RANK=2)
    distributed.join()
    backend = [("device", 2), ("cpu:gloo,cuda:nccl", True)] if gpus else [("gloo", True)]
    assert called == [*backend, ("at the end", dist.destroy_process_group)]


def _share() -> Any:
    called = []

    def make() -> str:
        called.append(distributed.rank())
        return "made"

    mine = distributed.shared_out(["a", "b", "c", "d", "e"])
    distributed.join()
    distributed.join()  # the second time it is there already
    distributed.agree("inputs", "same")
    distributed.wait()
    made, everyones = distributed.from_first(make), distributed.everyones(distributed.rank() * 10)
    return made, called, everyones, mine, distributed.together({at: item.upper() for at, item in mine.items()})


@pytest.mark.parametrize("count", [2, 3])
def test_a_launch_shares_work_out_and_puts_it_together_in_order(count: int) -> None:
    for number, answer in enumerate(launch(count, _share)):
        assert not isinstance(answer, BaseException), answer
        made, called, everyones, mine, whole = answer
        assert made == "made"
        assert called == ([0] if number == 0 else [])
        assert everyones == [10 * other for other in range(count)]
        assert mine == {place: item for place, item in enumerate("abcde") if place % count == number}
        assert whole == list("ABCDE")


@pytest.mark.parametrize("first", ["from_first", "everyones"])
def test_whatever_comes_first_meets_the_others(first: str) -> None:
    calls = {"from_first": lambda: distributed.from_first(lambda: 3), "everyones": lambda: distributed.everyones(3)}
    assert launch(2, calls[first]) == ([3, 3] if first == "from_first" else [[3, 3], [3, 3]])


def _waited() -> float:
    distributed.join()
    begin = time.monotonic()
    if distributed.rank() == 1:
        time.sleep(1.0)
    distributed.wait()
    return time.monotonic() - begin


def test_waiting_ends_when_the_last_process_is_there() -> None:
    assert min(launch(2, _waited)) > 0.8


@pytest.mark.parametrize("odd", [1, 2])
def test_a_process_that_sees_something_else_stops_all_of_them(odd: int) -> None:
    for answer in launch(3, lambda: distributed.agree("inputs", "b" if distributed.rank() == odd else "a")):
        assert isinstance(answer, InputError)
        assert str(answer) == (
            f"process {odd} of 3 sees other inputs than process 0: all machines must share the run directory and the "
            "inputs"
        )


def _leave() -> tuple[bool, bool]:
    import torch.distributed as dist

    endings: list[Callable[[], None]] = []
    atexit.register = endings.append  # type: ignore[assignment]  # the others are pytest's, and this is a fork of it
    distributed.wait()  # as in every launch: nobody leaves while another still connects
    before = dist.is_initialized()
    for leave in endings:
        leave()
    return before, dist.is_initialized()


def test_a_process_that_ends_leaves_the_launch() -> None:
    assert launch(2, _leave) == [(True, False)] * 2


def test_what_fails_in_the_first_process_is_no_answer_of_the_others() -> None:
    """It raises in the first one; the launcher ends the others, which wait meanwhile: here they are not started."""

    def fail() -> Any:
        raise InputError("no")

    (answer,) = launch(1, lambda: distributed.from_first(fail))
    assert isinstance(answer, InputError)


class _Unreadable(Exception):
    """Can be written and not read: it is made of two values and keeps one."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what)


class _Unwritable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("cannot be written")


@pytest.mark.parametrize(
    ("error", "first", "others"),
    [
        (InputError("no"), "InputError: no", "InputError: no"),
        (_Unreadable("no", "here"), "_Unreadable: no", "RuntimeError: _Unreadable: no"),
        (_Unwritable("no"), "_Unwritable: no", "RuntimeError: _Unwritable: no"),
    ],
)
def test_what_fails_in_the_first_process_fails_in_all_of_them(error: Exception, first: str, others: str) -> None:
    def fail() -> Any:
        raise error

    def ended() -> str:
        try:
            return str(distributed.from_first(fail))
        except Exception as failure:
            return f"{type(failure).__name__}: {failure}"

    assert launch(3, ended) == [first, others, others]
