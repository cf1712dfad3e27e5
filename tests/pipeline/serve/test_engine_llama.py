"""Laws of the embedded engine, with real GGUF files: training's tokens, clean state, cancellation, failing closed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running_server import RunningServer, answer_of, error, request, status
from template_shapes import SHAPES, shaped
from tiny_gguf import write_tiny

from pipeline.base_model import demo_file
from pipeline.data.masking import render_row
from pipeline.data.render import CLOCK
from pipeline.data.think_form import FORM_KEY, SYSTEM_MESSAGE, chat, format_assistant
from pipeline.release.generate import complete
from pipeline.serve.engine import EngineError, Job
from pipeline.serve.engine_llama import ChatTemplate, LlamaEngine, shipped_n_ctx, shipped_stops
from pipeline.serve.forms.of_model import form_of_file
from pipeline.serve.forms.registry import form_named
from pipeline.serve.guard import TooLong
from pipeline.serve.request import Limits
from pipeline.serve.request_error import Refusal
from pipeline.serve.tokens import Tokens
from so8t_core.errors import InputError
from verification.gguf.edit_keys import insert_keys
from verification.gguf.reader import read_gguf

CONVERSATIONS: list[list[dict[str, str]]] = [
    chat("13 と 4 と 6 の合計は?"),
    chat("\u3000It is 19:55. What time was it 55 minutes ago?", "Be brief."),
    [
        *chat("hi"),
        {"role": "assistant", "content": "hello\nthere"},
        {"role": "user", "content": "1234567 x\n\n  y <b>"},
    ],
]


LONG = CONVERSATIONS[2]
KEEP_ALIVE = b"c\r\n: thinking\n\n\r\n"  # a chunk of its own


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
        for task in (waiting, running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
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
    said = [
        server.ask(stream=stream, messages=[{"role": "user", "content": text}]) for text in ("Say hello.", "13 + 4?")
    ]
    responses = {response.replace(KEEP_ALIVE, b"") for response in said}  # sent where a loaded machine takes long
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


def spoken(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch, text: str) -> Coroutine[Any, Any, Any]:
    """The engine's reply where the model would choose the tokens of this text, control tokens included."""
    import llama_cpp

    ids = iter(engine.model.tokenize(text))
    monkeypatch.setattr(llama_cpp, "llama_sampler_sample", lambda *_: next(ids))
    return collect(engine, Job(CONVERSATIONS[0]))


def test_markers_that_are_control_tokens_reach_the_guard(
    start: Callable[..., RunningServer], tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `[THINK]` and `<|channel|>` are in their families' vocabularies; every other control token is an error."""
    form = form_named("<issue_start>...<issue_closed>")
    said = "<issue_start>13 + 4 = 17<issue_closed>17"

    async def scenario(engine: LlamaEngine) -> None:
        assert await spoken(engine, monkeypatch, f"{said}<|im_end|>") == (said, "stop")
        with pytest.raises(EngineError, match="control token"):
            await spoken(engine, monkeypatch, "17<file_sep>")

    with_engine(tiny_gguf, scenario, form=form)

    async def without(engine: LlamaEngine) -> None:
        with pytest.raises(EngineError, match="control token"):
            await spoken(engine, monkeypatch, said)

    with_engine(tiny_gguf, without)


def test_every_end_that_was_shipped_ends_a_turn(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CASES B7: the stops of the Modelfile, and the token by which the template ends an answer."""
    file = tmp_path / "m.gguf"
    shutil.copyfile(tiny_gguf, file)
    stops = ["<|im_end|>", "<|endoftext|>", "<file_sep>", "plain words"]
    (tmp_path / "m.Modelfile").write_text("".join(f'PARAMETER stop "{stop}"\n' for stop in stops))
    assert shipped_stops(file) == stops

    async def scenario(engine: LlamaEngine) -> None:
        for stop in stops[:3]:
            assert await spoken(engine, monkeypatch, f"17{stop}") == ("17", "stop")
        assert (await spoken(engine, monkeypatch, "17 plain words and so on, and so on, and so on 1 2 3"))[
            1
        ] == "length"

    with_engine(file, scenario)

    async def bare(engine: LlamaEngine) -> None:
        with pytest.raises(EngineError, match="control token"):
            await spoken(engine, monkeypatch, "17<file_sep>")

    with_engine(tiny_gguf, bare)
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}<file_sep>\n{% endfor %}"
    marked = with_template(tiny_gguf, tmp_path / "t.gguf", turns)

    async def ends(engine: LlamaEngine) -> None:
        assert await spoken(engine, monkeypatch, "17<file_sep>") == ("17", "stop")

    with_engine(marked, ends)


def with_template(source: Path, target: Path, template: str) -> Path:
    """A copy of a GGUF file with another chat template."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value = template if field.name == "tokenizer.chat_template" else field.contents()
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_form_is_the_files(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's, the pipeline's own where the Modelfile asks for it, or the one that is forced."""
    file = with_template(tiny_gguf, tmp_path / "m.gguf", CHATML.replace("assistant\n", "assistant\n<think>\n"))

    async def form(engine: LlamaEngine) -> str:
        return engine.form.name

    async def prompt(engine: LlamaEngine) -> str:
        return engine.template.render(chat("q"))

    assert with_engine(file, form) == "think"
    assert with_engine(file, prompt).endswith("<|im_start|>assistant\n<think>\n")
    assert with_engine(file, form, form=form_named("mistral")) == "mistral"
    assert with_engine(tiny_gguf, form) == "so8t"
    file.with_suffix(".Modelfile").write_text(f'SYSTEM """{SYSTEM_MESSAGE}"""\n', encoding="utf-8")
    assert with_engine(file, form) == "so8t"


def test_a_model_whose_template_opens_the_thinking_is_served(
    start: Callable[..., RunningServer], tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    file = with_template(tiny_gguf, tmp_path / "m.gguf", CHATML.replace("assistant\n", "assistant\n<think>\n"))
    server = start(lambda: LlamaEngine(file, max_new_tokens=64))
    for said, shown in (("13 + 4\n</think>\n\n17<|im_end|>", "17"), ("13 + 4 = 17<|im_end|>", None)):
        ids = iter(server.engine.model.tokenize(said))  # type: ignore[attr-defined]
        monkeypatch.setattr(llama_cpp, "llama_sampler_sample", lambda *_, ids=ids: next(ids))
        response = server.ask()
        if shown is None:
            assert error(response)["code"] == "answer_withheld"
        else:
            assert answer_of(response, False) == shown


def test_templates_are_rendered_as_transformers_renders_them(tiny_dir: Path) -> None:
    """CASES B1 and B2: marks for training change nothing, and a template may write today's date."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    marked = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    dated = CHATML + "{{ strftime_now('%Y-%m-%d') }}"
    quoted = CHATML.replace("{{ m.content }}", "{{ m | tojson }}{{ m | tojson(indent=1) }}")
    loops = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if loop.last %}{% break %}{% endif %}")
    for template in (CHATML, marked, dated, quoted, loops):
        for messages in CONVERSATIONS:
            expected = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            assert ChatTemplate(template, bos="", eos="").render(messages) == expected
    plain, with_marks = (ChatTemplate(t, bos="", eos="").render(CONVERSATIONS[2]) for t in (CHATML, marked))
    assert plain == with_marks


@pytest.mark.parametrize("messages", [LONG, LONG[:2]], ids=["two turns", "one turn"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_user_gets_the_prompt_that_was_trained(
    name: str, messages: list[dict[str, str]], phi35: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the base's template knows no system role or wants content as parts."""
    tokenizer, reply = shaped(phi35, name), {"role": "assistant", "content": format_assistant("2 + 2 = 4.", "4")}
    row = render_row(tokenizer, [*messages, reply])
    trained = tokenizer.decode(row.input_ids[: row.prompt_length], clean_up_tokenization_spaces=False)
    monkeypatch.setattr(
        "pipeline.serve.engine_llama.datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: CLOCK))
    )
    served = ChatTemplate(tokenizer.chat_template, bos="<s>", eos=tokenizer.eos_token).render(messages)
    assert served == trained
    assert all(message["content"] in served for message in messages)


@pytest.mark.parametrize(
    ("named", "form"),
    [("so8t", "so8t"), ("base", "think"), ("mistral", "mistral"), ("<plan>...</plan>", "<plan>...</plan>")],
)
def test_the_files_own_key_names_the_form(named: str, form: str, tmp_path: Path) -> None:
    """The key travels with the file; a Modelfile beside it may be lost or of another file."""
    path = write_tiny(tmp_path / "m.gguf")
    insert_keys(path, {FORM_KEY: named})
    path.with_suffix(".Modelfile").write_text(f'SYSTEM """{SYSTEM_MESSAGE}"""\n', encoding="utf-8")
    assert form_of_file(read_gguf(path), CHATML + "<think>").name == form


def test_a_key_that_names_no_form_is_refused_with_a_way_out(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    insert_keys(path, {FORM_KEY: "loud"})
    with pytest.raises(InputError, match=r"so8t\.think_form 'loud'.*--think-form"):
        form_of_file(read_gguf(path), CHATML)


@pytest.mark.parametrize("fault", ["{{ 1 // 0 }}", "{{ messages[9].content }}", "{{ undefined.x }}", "{{ 'a' + 1 }}"])
def test_a_template_that_fails_refuses_the_request(fault: str) -> None:
    with pytest.raises(Refusal, match="template"):
        ChatTemplate(fault, bos="", eos="").render(chat("q"))
