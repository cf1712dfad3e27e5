"""Laws of the start: what cannot be served safely does not start; what starts works with the real OpenAI client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_upstream import ANSWER, CANARY, OK, FakeUpstream, chunk, generation, no_canary, text

from pipeline.serve.engine_upstream import check_url, is_loopback
from pipeline.serve.start import ServeConfig, serve
from so8t_core.errors import InputError

KEY = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["either --model", "--upstream"]),
        ({"model": "a.gguf", "upstream": "http://127.0.0.1:1"}, ["either --model"]),
        ({"model": "gone.gguf"}, ["gone.gguf does not exist"]),
        ({"upstream": "http://10.0.0.5:8080"}, ["10.0.0.5", "--allow-remote-upstream"]),
        ({"upstream": "http://localhost.example"}, ["--allow-remote-upstream"]),
        ({"upstream": "ftp://127.0.0.1"}, ["no http or https URL"]),
        ({"upstream": "file:///etc/passwd"}, ["no http or https URL"]),
        ({"upstream": "127.0.0.1:80"}, ["no http or https URL"]),
        ({"upstream": "http://127.0.0.1:99999"}, ["no http or https URL"]),
        ({"upstream": "http://me:pw@127.0.0.1"}, ["SO8T_UPSTREAM_KEY"]),
        ({"upstream": "http://127.0.0.1/?a=b"}, ["scheme, host, port and path only"]),
        ({"upstream": "http://127.0.0.1:1", "host": "0.0.0.0"}, ["0.0.0.0", "--new-key", "keys"]),
        ({"upstream": "http://127.0.0.1:1", "host": "::"}, ["API keys"]),
        ({"upstream": "http://127.0.0.1:1", "keys": "gone.json"}, ["gone.json does not exist"]),
        ({"upstream": "http://127.0.0.1:1", "n_ctx": 512, "max_new_tokens": 512}, ["leaves no room"]),
        ({"upstream": "http://127.0.0.1:1", "host": "198.51.100.7", "keys": "good.json"}, ["cannot listen"]),
        ({"upstream": "http://127.0.0.1:1", "audit_log": "no/such/dir/a.jsonl"}, ["cannot open the audit log"]),
        ({"upstream": "http://127.0.0.1:1", "audit_key_file": "short"}, ["5 bytes", "32"]),
        ({"model": "a.gguf", "tokenizer": "b.gguf"}, ["--tokenizer goes with --upstream"]),
        ({"upstream": "http://127.0.0.1:1", "think_form": "tink"}, ["'tink'", "think", "harmony", "<plan>...</plan>"]),
        ({"upstream": "http://127.0.0.1:1", "think_form": "---...***"}, ["letter"]),
        ({"model": "a.gguf", "think_form": "separated"}, ["goes with --upstream"]),
    ],
)
def test_what_cannot_be_served_safely_does_not_start(
    options: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.serve.keys import new_api_key

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SO8T_AUDIT_KEY", KEY)
    new_api_key(Path("good.json"), "a")
    Path("short").write_text("short")
    Path("short").chmod(0o600)
    with pytest.raises(InputError) as caught:
        serve(ServeConfig(port=0, **options), announce=lambda line: pytest.fail(f"it started: {line}"))
    for word in words:
        assert word in str(caught.value)


def test_no_deployment_key_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SO8T_AUDIT_KEY", raising=False)
    with pytest.raises(InputError, match="no deployment key"):
        serve(ServeConfig(upstream="http://127.0.0.1:1", port=0), announce=lambda line: pytest.fail("it started"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.example", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("", False),
    ],
)
def test_loopback_is_recognised(host: str, found: bool) -> None:
    assert is_loopback(host) is found


def test_upstream_urls_lose_their_last_slash_only() -> None:
    assert check_url("http://[::1]:8080/base/", allow_remote=False) == "http://[::1]:8080/base"
    assert check_url("https://gpu.example/v1", allow_remote=True) == "https://gpu.example/v1"


ENVIRONMENT = {**os.environ, "SO8T_AUDIT_KEY": KEY, "PYTHONPATH": str(Path(__file__).parents[3])}


def so8t(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


@contextmanager
def started(folder: Path, *options: str, shown: str = "thinking as ") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in a process of its own; (base URL, process)."""
    with open(folder / "stderr", "w") as errors:  # not a pipe: a full one would stop the server
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli.main", "serve", "--port", "0", *options],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=ENVIRONMENT,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://" in line, (folder / "stderr").read_text()
        assert shown in line
        yield line.split(" at ")[1].split(",")[0], process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_real_openai_client_works_with_the_command(tmp_path: Path, upstream: FakeUpstream) -> None:
    """Stream and not, models, errors, keys, clean end; then `audit verify` with the head that the server printed."""
    key = so8t(tmp_path, "serve", "--new-key", "alice", "--keys", "keys.json").stdout.strip()
    ask: list[Any] = [{"role": "user", "content": "what is it?"}]
    with started(tmp_path, "--upstream", upstream.url, "--name", "m", "--keys", "keys.json") as (url, process):
        client = openai.OpenAI(base_url=url, api_key=key)
        assert [model.id for model in client.models.list()] == ["m"]
        whole = client.chat.completions.create(model="m", messages=ask)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (ANSWER, "stop")
        again = client.chat.completions.create(model="m", messages=[*ask, whole.choices[0].message, *ask])
        assert again.choices[0].message.content == ANSWER
        with client.chat.completions.create(model="m", messages=ask, stream=True) as stream:
            events = list(stream)
        assert "".join(event.choices[0].delta.content or "" for event in events) == ANSWER
        assert events[-1].choices[0].finish_reason == "stop"
        with pytest.raises(openai.UnprocessableEntityError, match="logprobs"):
            client.chat.completions.create(model="m", messages=ask, logprobs=True)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong").models.list()
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-4", messages=ask)
        upstream.script = lambda _: generation(f"{CANARY}\n{text()}")
        asked = len(upstream.requests)
        with pytest.raises(openai.InternalServerError, match="may be shown"):
            client.chat.completions.create(model="m", messages=ask)
        assert len(upstream.requests) == asked + 1  # the client does not try again in vain
        with pytest.raises(openai.APIError, match="may be shown"):
            list(client.chat.completions.create(model="m", messages=ask, stream=True))
        upstream.script = lambda _: [OK, chunk(text()), 30.0]
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3, max_retries=0).chat.completions.create(model="m", messages=ask)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    err = (tmp_path / "stderr").read_text()
    assert process.returncode == 0
    no_canary(out.encode(), err.encode(), (tmp_path / "so8t-audit.jsonl").read_bytes())
    head = out.strip().rsplit(" at ", 1)[1]

    good = so8t(tmp_path, "audit", "verify", "so8t-audit.jsonl", "--expect-head", head)
    assert (good.returncode, head in good.stdout) == (0, True), good.stderr
    log = tmp_path / "so8t-audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"withheld", b"released", 1))
    bad = so8t(tmp_path, "audit", "verify", "so8t-audit.jsonl")
    assert bad.returncode == 1
    assert "was edited" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    ("options", "shown", "said"),
    [
        ([], "thinking as so8t (# 思考ステップ ... # 最終回答)", text()),
        (["--think-form", "think"], "thinking as think (<think> ... </think>)", f"<think>{CANARY}</think>{ANSWER}"),
        (["--think-form", "[P]...[/P]"], "thinking as [P]...[/P] ([P] ... [/P])", f"[P]{CANARY}[/P]{ANSWER}"),
    ],
)
def test_the_form_is_shown_at_the_start_and_can_be_forced(
    tmp_path: Path, upstream: FakeUpstream, options: list[str], shown: str, said: str
) -> None:
    upstream.script = lambda _: generation(said)
    with started(tmp_path, "--upstream", upstream.url, "--name", "m", *options, shown=shown) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        reply = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "q"}])
        assert reply.choices[0].message.content == ANSWER


def test_an_operators_key_opens_the_metrics(tmp_path: Path, upstream: FakeUpstream) -> None:
    import httpx

    boss = so8t(tmp_path, "serve", "--new-key", "boss", "--operator", "--keys", "keys.json").stdout.strip()
    user = so8t(tmp_path, "serve", "--new-key", "user", "--keys", "keys.json").stdout.strip()
    with started(tmp_path, "--upstream", upstream.url, "--name", "m", "--keys", "keys.json") as (url, _):
        for key, status in ((boss, 200), (user, 403)):
            found = httpx.get(url.removesuffix("/v1") + "/metrics", headers={"authorization": f"Bearer {key}"})
            assert found.status_code == status


def test_a_killed_server_starts_again_with_its_log(tmp_path: Path, upstream: FakeUpstream) -> None:
    for expected in (0, 2):
        with started(tmp_path, "--upstream", upstream.url, "--name", "m") as (url, process):
            assert process.stdout is not None
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "q"}])
            process.kill()
        assert (tmp_path / "so8t-audit.jsonl").read_bytes().count(b"\n") == expected + 2


def test_a_signal_at_the_first_moment_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its announcement and the web server's own handlers lay a moment in which SIGTERM was lost for good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SO8T_AUDIT_KEY", KEY)
    lines: list[str] = []

    def announce(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            signal.raise_signal(signal.SIGTERM)

    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    second = threading.Timer(5, os.kill, (os.getpid(), signal.SIGTERM))
    second.start()
    try:
        serve(ServeConfig(upstream="http://127.0.0.1:1", port=0), announce=announce)
        needed_only_one = second.is_alive()
    finally:
        second.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert needed_only_one
    assert len(lines) == 2
    assert lines[1].startswith("stopped")
