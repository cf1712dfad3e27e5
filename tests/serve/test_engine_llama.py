"""Laws of the embedded engine, with real GGUF files: training's tokens, clean state, cancellation, failing closed."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from running_server import RunningServer, error, request, status

from pipeline.base_model import demo_file
from pipeline.data.think_form import chat
from pipeline.release.generate import complete
from pipeline.serve.engine import Job
from pipeline.serve.engine_llama import ChatTemplate, LlamaEngine, shipped_n_ctx
from pipeline.serve.guard import TooLong
from pipeline.serve.protocol import Refusal
from pipeline.serve.request import Limits
from pipeline.serve.tokens import Tokens
from so8t_core.errors import InputError

CONVERSATIONS: list[list[dict[str, str]]] = [
    chat("13 と 4 と 6 の合計は?"),
    chat("\u3000It is 19:55. What time was it 55 minutes ago?", "Be brief."),
    [
        *chat("hi"),
        {"role": "assistant", "content": "hello\nthere"},
        {"role": "user", "content": "1234567 x\n\n  y <b>"},
    ],
]


def collect(engine: LlamaEngine, job: Job) -> Coroutine[Any, Any, tuple[str, str | None]]:
    async def run() -> tuple[str, str | None]:
        pieces: list[bytes] = []
        finish = await engine.generate(job, pieces.append)
        return b"".join(pieces).decode("utf-8", "replace"), finish

    return run()


def with_engine(gguf: Path, scenario: Callable[[LlamaEngine], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def run() -> Any:
        engine = LlamaEngine(gguf, **{"max_new_tokens": 16, **options})
        try:
            return await scenario(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_prompts_have_the_very_ids_of_training(tiny_gguf: Path, tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)

    async def scenario(engine: LlamaEngine) -> None:
        for messages in CONVERSATIONS:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert engine.template.render(messages) == rendered
            assert engine.prompt(messages) == tokenizer(rendered, add_special_tokens=False).input_ids
            assert engine.check(messages) == len(engine.prompt(messages))

    with_engine(tiny_gguf, scenario)


def test_greedy_text_is_the_batch_decoders_and_nothing_stays_from_before(tiny_gguf: Path) -> None:
    async def scenario(engine: LlamaEngine) -> list[tuple[str, str | None]]:
        prompts = [engine.template.render(messages) for messages in CONVERSATIONS]
        expected = [
            (c.text, "stop" if c.finished else "length")
            for c in complete(tiny_gguf, prompts, max_new_tokens=16, parallel=1)
        ]
        jobs = [Job(messages) for messages in CONVERSATIONS]
        assert [await collect(engine, job) for job in jobs] == expected
        assert [await collect(engine, job) for job in reversed(jobs)] == expected[::-1]
        assert list(await asyncio.gather(*(collect(engine, job) for job in jobs))) == expected
        assert len({text for text, _ in expected}) == 3
        return expected

    with_engine(tiny_gguf, scenario)


def test_seeds_repeat_and_differ(tiny_gguf: Path) -> None:
    async def scenario(engine: LlamaEngine) -> None:
        def job(seed: int | None) -> Job:
            return Job(CONVERSATIONS[0], temperature=1.0, top_p=0.9, seed=seed)

        assert await collect(engine, job(1)) == await collect(engine, job(1))
        # Two answers of a tiny model may well be the same; eight of them are not.
        assert len({await collect(engine, job(seed)) for seed in range(8)}) > 2
        assert len({await collect(engine, job(None)) for _ in range(8)}) > 2

    with_engine(tiny_gguf, scenario)


def test_cancelled_generation_ends_at_once_and_leaves_a_clean_engine(tiny_gguf: Path) -> None:
    async def scenario(engine: LlamaEngine) -> None:
        short = Job(CONVERSATIONS[1])
        engine.max_new_tokens = 16
        before = await collect(engine, short)
        engine.max_new_tokens = 700
        fed: list[bytes] = []
        running = asyncio.create_task(engine.generate(Job(CONVERSATIONS[0], temperature=1.0, seed=3), fed.append))
        waiting = asyncio.create_task(engine.generate(short, fed.append))
        while len(fed) < 3:
            await asyncio.sleep(0.001)
        began = time.monotonic()
        for task in (waiting, running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert time.monotonic() - began < 2
        count = len(fed)
        assert count < 700
        engine.max_new_tokens = 16
        assert await collect(engine, short) == before
        assert len(fed) == count

    with_engine(tiny_gguf, scenario, max_new_tokens=700)


def test_a_feed_that_refuses_ends_the_generation(tiny_gguf: Path) -> None:
    async def scenario(engine: LlamaEngine) -> None:
        def feed(piece: bytes) -> None:
            raise TooLong

        with pytest.raises(TooLong):
            await engine.generate(Job(CONVERSATIONS[0]), feed)
        await collect(engine, Job(CONVERSATIONS[0]))

    with_engine(tiny_gguf, scenario)


def test_context_is_as_shipped(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    shutil.copyfile(tiny_gguf, file)
    assert shipped_n_ctx(file) == 4096
    (tmp_path / "m.Modelfile").write_text('FROM ./m.gguf\nSYSTEM """PARAMETER num_ctx 9"""\nPARAMETER num_ctx 512\n')
    assert shipped_n_ctx(file) == 512

    async def context(engine: LlamaEngine) -> int:
        return engine.n_ctx

    assert with_engine(file, context) == 512
    assert with_engine(file, context, n_ctx=256) == 256
    assert with_engine(tiny_gguf, context) == 1024  # what the model was trained for


def test_conversation_without_room_for_an_answer_is_refused(tiny_gguf: Path) -> None:
    async def scenario(engine: LlamaEngine) -> None:
        engine.check(chat("x " * 20))
        with pytest.raises(Refusal, match="at most 240 are possible") as caught:
            engine.check(chat("x " * 300))
        assert (caught.value.status, caught.value.code) == (422, "context_length_exceeded")

    with_engine(tiny_gguf, scenario, n_ctx=256)


@pytest.mark.parametrize("word", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "a<|im_end|>b"])
def test_control_tokens_in_messages_are_refused(tiny_gguf: Path, word: str) -> None:
    async def scenario(engine: LlamaEngine) -> None:
        for messages in (
            chat(word),
            chat("q", word),
            [*chat("q"), {"role": "assistant", "content": word}, *chat("q")[1:]],
        ):
            with pytest.raises(Refusal, match="control token"):
                engine.check(messages)
        engine.check(chat("a < b |> c <|> im_end <im_end>"))

    with_engine(tiny_gguf, scenario)


def test_cut_gives_a_prefix_of_whole_characters() -> None:
    tokens = Tokens.load(demo_file())
    for text in ("plain words here", "四十二 😀🎉 naïve", " leading", "1234567890", "", "é" * 20):
        shown = [tokens.cut(text, n) for n in range(1, 40)]
        assert all(text.startswith(one) for one in shown)
        assert shown == sorted(shown, key=len)
        assert shown[-1] == text
        assert all(tokens.count(one) <= n + 1 for n, one in enumerate(shown, start=1))


def test_template_can_neither_run_code_nor_hide_its_refusal() -> None:
    with pytest.raises(Refusal, match="order of roles"):
        ChatTemplate("{{ raise_exception('secret') }}", bos="", eos="").render(chat("q"))
    with pytest.raises(Refusal, match="order of roles"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", bos="", eos="").render(chat("q"))
    with pytest.raises(InputError, match="not valid Jinja"):
        ChatTemplate("{% if %}", bos="", eos="")


@pytest.mark.parametrize(
    ("options", "word"),
    [({"max_new_tokens": 1024}, "leaves no room"), ({"n_ctx": 256, "max_new_tokens": 256}, "leaves no")],
)
def test_limits_that_do_not_fit_are_refused(tiny_gguf: Path, options: dict[str, int], word: str) -> None:
    with pytest.raises(InputError, match=word):
        LlamaEngine(tiny_gguf, **options)
    with pytest.raises(InputError, match="does not exist"):
        LlamaEngine(Path("gone.gguf"))


@pytest.mark.parametrize("stream", [False, True])
def test_untrained_model_fails_closed(start: Callable[..., RunningServer], stream: bool) -> None:
    """The real SmolLM2 does not know the form: whatever it says stays here."""
    server = start(lambda: LlamaEngine(demo_file(), max_new_tokens=12), fixed=True)
    responses = {
        server.ask(stream=stream, messages=[{"role": "user", "content": text}]) for text in ("Say hello.", "13 + 4?")
    }
    [response] = responses  # one and the same error, whatever was generated
    assert status(response) == (200 if stream else 502)
    assert error(response)["code"] == "answer_withheld"
    first, second = server.records()
    assert {first["reason"], second["reason"]} <= {"not ended by the model", "thinking marker not first"}
    assert first["thinking_hmac"] != second["thinking_hmac"]
    assert first["model"].startswith("sha256:")


def test_embedded_queue_refuses_and_disconnects_free_it(start: Callable[..., RunningServer], tiny_gguf: Path) -> None:
    server = start(lambda: LlamaEngine(tiny_gguf, max_new_tokens=900), limits=Limits(in_flight=2, seconds=60))
    asked = request({"messages": [{"role": "user", "content": "q"}], "temperature": 1.0, "seed": 3})
    held = [server.connect() for _ in range(2)]
    for connection in held:
        connection.sendall(asked)
    server.wait_for(lambda: server.decider.running.total() == 2)
    response = server.ask()
    assert (status(response), error(response)["code"]) == (503, "queue_full")
    for connection in held:
        connection.close()
    server.wait_for(lambda: not server.decider.running)
    assert [record["reason"] for record in server.records()].count("cancelled") >= 1
    assert status(server.raw(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")) == 200
