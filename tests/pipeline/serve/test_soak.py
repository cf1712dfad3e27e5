"""Load: 64 clients for two minutes, well-behaved and hostile; no error, no leak, flat memory; the guard's own cost."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_replies import friendly, hostile
from fake_upstream import ANSWER, FakeUpstream, generation, no_canary, text
from running_server import request
from test_start import ENVIRONMENT, started

from pipeline.serve.audit_log import verify

pytestmark = pytest.mark.soak

CLIENTS = 64
SECONDS = float(os.environ.get("SO8T_SOAK_SECONDS", "120"))
ASKED = request({"messages": [{"role": "user", "content": "what is it?"}]})


def resident(pid: int) -> int:
    """Resident memory in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def processor(pid: int) -> float:
    """Seconds of processor time so far: what a busy machine does not change much."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(port: int, data: bytes, *, leave_after: float | None = None) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            return b""
        return await reader.read(-1)
    except ConnectionError:  # refused while the body was still under way
        return b"reset"
    finally:
        writer.close()


async def load(
    ports: list[int],
    seconds: float,
    pause: float,
    one: Callable[[int, random.Random], tuple[bytes, float | None]],
    seen: Callable[[int, bytes, float], None],
) -> None:
    """CLIENTS clients, each in turn on every port, `pause` seconds between two requests."""
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        await asyncio.sleep(rng.uniform(0, pause))
        while time.monotonic() < end:
            for port in ports:
                data, leave = one(port, rng)
                began = time.perf_counter()
                response = await ask(port, data, leave_after=leave)
                seen(port, response, time.perf_counter() - began)
                await asyncio.sleep(rng.uniform(0, 2 * pause))

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))


def syncs(folder: Path) -> tuple[float, float]:
    """Milliseconds that one append and its sync take here, at the median and the 99th percentile."""
    taken = []
    with open(folder / "sync", "ab", buffering=0) as file:
        for _ in range(300):
            began = time.perf_counter()
            file.write(b"x" * 500)
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - began)
    return percentile(taken, 0.5), percentile(taken, 0.99)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] * 1000


def test_sixty_four_clients_see_no_error_and_memory_stays_flat(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.keep = False
    reply = generation(text(), size=3)
    upstream.script = lambda _: [b"".join(reply)]
    bare = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "bare_proxy.py"), upstream.url],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert bare.stdout is not None
        bare_port = urlsplit(bare.stdout.readline().split(" at ")[1].split(",")[0]).port
        with started(tmp_path, "--upstream", upstream.url, "--name", "m", "--queue", "200") as (url, process):
            port = urlsplit(url).port
            assert port is not None
            assert bare_port is not None
            times: dict[int, list[float]] = {port: [], bare_port: []}
            memory: list[int] = []

            def seen(at: int, response: bytes, seconds: float) -> None:
                assert response.startswith(b"HTTP/1.1 200 OK"), response[:500]
                if at == port:
                    no_canary(response)
                    if len(times[at]) % 200 == 0:
                        memory.append(resident(process.pid))
                times[at].append(seconds)

            spent = {port: -processor(process.pid), bare_port: -processor(bare.pid)}
            asyncio.run(load([port, bare_port], SECONDS, 1.0, lambda *_: (ASKED, None), seen))
            spent = {port: spent[port] + processor(process.pid), bare_port: spent[bare_port] + processor(bare.pid)}
        assert verify(tmp_path / "so8t-audit.jsonl").seq == len(times[port])
    finally:
        bare.kill()
        bare.wait()
    for name, at in (("guarded", port), ("bare", bare_port)):
        shown = ", ".join(f"p{100 * share:g} {percentile(times[at], share):.1f} ms" for share in (0.5, 0.9, 0.99))
        used = f"{1000 * spent[at] / len(times[at]):.2f} ms of processor each"
        print(f"{name}: {len(times[at])} requests, {used}, mean {statistics.fmean(times[at]) * 1000:.1f} ms, {shown}")
    more = {share: percentile(times[port], share) - percentile(times[bare_port], share) for share in (0.5, 0.9, 0.99)}
    print("the guard's own:", ", ".join(f"p{100 * share:g} {ms:.1f} ms" for share, ms in more.items()))
    print(f"one record on this disk: {', '.join(f'{ms:.2f}' for ms in syncs(tmp_path))} ms (p50, p99)")
    settled = memory[len(memory) // 4 :]
    print(f"resident memory: {memory[0]} KiB at first, {settled[0]} to {settled[-1]} KiB after the first quarter")
    assert settled[-1] < settled[0] * 1.05 + 2048


def test_hostile_clients_and_upstreams_leave_the_server_up_and_flat(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.keep = False
    replies = [*hostile().values(), *friendly().values()]
    dice = random.Random(0)
    upstream.script = lambda _: dice.choice(replies)
    bodies = [
        ASKED,
        ASKED,
        request({"messages": [{"role": "user", "content": "q"}], "stream": True}),
        request(b"{"),
        request({"logprobs": True}),
        request(b"x" * 300_000),
        ASKED[:80],
        b"\x00" * 50,
        request({"messages": [{"role": "user", "content": "x" * 200_000}]}),
    ]

    def one(_: int, rng: random.Random) -> tuple[bytes, float | None]:
        data = rng.choice(bodies)
        return data, rng.uniform(0, 0.2) if rng.random() < 0.2 or data == ASKED[:80] else None

    codes: Counter[bytes] = Counter()
    memory: list[int] = []
    with started(tmp_path, "--upstream", upstream.url, "--name", "m", "--queue", "40") as (url, process):
        port = urlsplit(url).port
        assert port is not None

        def seen(at: int, response: bytes, seconds: float) -> None:
            no_canary(response)
            codes[response[9:12]] += 1
            if codes.total() % 200 == 0:
                memory.append(resident(process.pid))

        asyncio.run(load([port], SECONDS, 0.5, one, seen))
        assert process.poll() is None
        upstream.script = lambda _: generation(text())
        assert ANSWER.encode() in asyncio.run(ask(port, ASKED))
        process.terminate()
        out, _ = process.communicate(timeout=30)
        err = (tmp_path / "stderr").read_text()
        assert len(err) < 10_000, "clients can flood the log"
        no_canary(out.encode(), err.encode(), (tmp_path / "so8t-audit.jsonl").read_bytes())
        assert "Traceback" not in err
    verify(tmp_path / "so8t-audit.jsonl")
    settled = memory[len(memory) // 4 :]
    print(dict(codes), f"resident memory: {memory[0]} KiB at first, {settled[0]} to {settled[-1]} KiB later")
    assert {b"200", b"400", b"413", b"422", b"502"} <= set(codes)
    assert settled[-1] < settled[0] * 1.05 + 4096
