"""Laws of the data step: nothing invented, nothing lost uncounted, nothing held out is trained on, same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DataConfig, GeneratorConfig
from pipeline.data.build import build_dataset
from pipeline.data.generator import generate
from pipeline.data.masking import IGNORED, encode_row
from pipeline.data.report import DataReport
from pipeline.data.rows import LABELS, to_think_row
from pipeline.data.split.markers import split_at_marker as split_reasoning
from pipeline.data.think_form import SYSTEM_MESSAGE, RowError, format_assistant, parse
from so8t_core.errors import InputError

THINK = format_assistant("2 + 3 = 5", "5")


def write(path: Path, *rows: Any) -> str:
    """A JSONL file; bytes and strings go in as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def build(tmp_path: Path, tokenizer: Any, *, seed: int = 0, out: str = "out", **config: Any) -> DataReport:
    config.setdefault("heldout_share", 0)
    config.setdefault("unlisted_sources", "allow")
    (tmp_path / out).mkdir()
    return build_dataset(DataConfig(**config), tokenizer, tmp_path / out, seed)


def read(tmp_path: Path, name: str, out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / out / f"{name}.jsonl").read_text("utf-8").splitlines()]


def qa(number: int) -> dict[str, str]:
    return {"question": f"What is {number} + 1?", "answer": f"{number} + 1 = {number + 1}\n#### {number + 1}"}


FORMATS = {
    "instruction": {"instruction": "Add.", "input": "2 and 3", "output": "2 + 3 = 5. So the answer is 5."},
    "instruction without input": {
        "instruction": "Add.\n\n2 and 3",
        "input": "",
        "output": "2 + 3 = 5. The answer is 5",
    },
    "prompt": {"prompt": "Add.\n\n2 and 3", "response": "2 + 3 = 5.\n\nTherefore, the final answer is: 5."},
    "question": {"question": "Add.\n\n2 and 3", "answer": "2 + 3 = 5.\n#### 5"},
    "messages": {
        "messages": [
            {"role": "user", "content": "Add.\n\n2 and 3"},
            {"role": "assistant", "content": "2 + 3 = 5.\n答えは5です。"},
        ]
    },
    "think": {"prompt": "Add.\n\n2 and 3", "response": format_assistant("2 + 3 = 5.", "5")},
    "steps": {"prompt": "Add.\n\n2 and 3", "steps": "2 + 3 = 5.", "answer": "5"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_row(name: str, tmp_path: Path, tokenizer: Any) -> None:
    build(tmp_path, tokenizer, sources=[write(tmp_path / "a.jsonl", FORMATS[name])])
    (row,) = read(tmp_path, "train")
    assert row["messages"] == [
        {"role": "system", "content": SYSTEM_MESSAGE},
        {"role": "user", "content": "Add.\n\n2 and 3"},
        {"role": "assistant", "content": format_assistant("2 + 3 = 5.", "5")},
    ]
    assert (row["answer"], row["source"], row["family"]) == ("5", "a.jsonl:1", "a")


SPLITS = {
    "He has 3. So the answer is (A).": ("He has 3.", "(A)"),
    "1.5 + 1 = 2.5, so the answer is 2.5.": ("1.5 + 1 = 2.5", "2.5"),
    "The answer is near 4. Check: 2 + 2 = 4.\nThe answer is 4.": ("The answer is near 4. Check: 2 + 2 = 4.", "4"),
    "x\n#### 1,000": ("x", "1,000"),
    "3個ある。したがって、答えは3個です。": ("3個ある。", "3個"),
    "2倍する。\n最終的な答え:8": ("2倍する。", "8"),
    "2倍する。\n最終的な答えは「はい」になります。": ("2倍する。", "「はい」"),
    "2倍する。\n答え 8": ("2倍する。", "8"),
    "2倍する。\n答え\n8": ("2倍する。", "8"),
    "Double it.\nAnswer: 8": ("Double it.", "8"),
}


@pytest.mark.parametrize("text", SPLITS)
def test_reasoning_splits_at_its_last_explicit_answer(text: str) -> None:
    thought = split_reasoning(text)
    assert (thought.steps, thought.answer) == SPLITS[text]


def test_a_split_takes_no_longer_for_a_long_run_of_stops() -> None:
    import time

    began = time.process_time()
    with pytest.raises(RowError, match="answer unclear"):
        split_reasoning("考える。\n答えは5" + "." * 200_000 + "x です。")
    assert time.process_time() - began < 20  # quadratic: hours


@given(st.text(), st.sampled_from(["\nThe answer is ", "\n#### ", "\n答えは"]), st.integers(0, 999))
def test_a_split_only_ever_cuts_the_text(steps: str, handover: str, answer: int) -> None:
    try:
        thought = split_reasoning(f"{steps}{handover}{answer}")
    except RowError:
        return
    assert thought.steps in steps
    assert thought.answer == str(answer)


USELESS = {
    "no reasoning": [
        {"question": "q", "answer": "5"},
        {"question": "q", "answer": "The answer is 5."},
        {"question": "q", "answer": "2 + 3 = 5. The answer is 5.\nThat was easy, was it not?"},
        {"question": "q", "answer": "答えを考える。5。"},
        {"question": "q", "answer": "A heading\n##### five"},
    ],
    "empty message": [{"question": " \u3000", "answer": THINK}],
    "empty answer": [{"question": "q", "answer": "2 + 3 = 5\n####"}],
    "marker missing": [{"question": "q", "answer": "# 最終回答\n5"}],
    "marker repeated": [{"question": "q", "answer": f"{THINK}\n\n{THINK}"}],
    "roles out of order": [
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "tool", "content": "q"}, {"role": "assistant", "content": THINK}]},
    ],
    "special token in a message": [{"question": "a<|endoftext|>b", "answer": THINK}],
    "too long": [{"question": "long " * 600, "answer": THINK}],
}


@pytest.mark.parametrize("reason", USELESS)
def test_a_useless_row_is_rejected_and_counted_by_reason(reason: str, tmp_path: Path, tokenizer: Any) -> None:
    report = build(tmp_path, tokenizer, sources=[write(tmp_path / "a.jsonl", qa(1), *USELESS[reason])])
    assert report.rejected == {reason: len(USELESS[reason])}
    assert report.train_rows == len(read(tmp_path, "train")) == 1


BROKEN = {
    "bad JSON": '{"question": ',
    "not an object": "[1, 2]",
    "unknown format": {"text": "hello"},
    "wrong type": {"question": "q", "answer": 5},
    "not UTF-8": '{"question": "q", "answer": "答え"}'.encode("cp932"),
}
MORE_BROKEN = {
    "bad JSON": "[" * 100_000,
    "not UTF-8": '{"question": "\\ud800", "answer": "x"}',
    "wrong type": {**qa(1), "safety_label": {"a": 1}},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_line_is_named_by_file_and_line_and_stops(reason: str, tmp_path: Path, phi35: Any) -> None:
    source = write(tmp_path / "a.jsonl", qa(1), "", BROKEN[reason])
    with pytest.raises(InputError, match=f"a.jsonl, line 3: {reason}: .*skip_bad_rows: true") as caught:
        build(tmp_path, phi35, sources=[source])
    assert len(str(caught.value).splitlines()) <= 2


def test_broken_lines_are_counted_when_they_are_skipped(tmp_path: Path, phi35: Any) -> None:
    source = write(tmp_path / "a.jsonl", qa(1), *BROKEN.values(), *MORE_BROKEN.values())
    report = build(tmp_path, phi35, sources=[source], skip_bad_rows=True)
    assert report.rejected == {"bad JSON": 2, "not UTF-8": 2, "wrong type": 2, "not an object": 1, "unknown format": 1}
    assert report.train_rows == 1


def test_missing_file_is_named_before_anything_is_read(tmp_path: Path, phi35: Any) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl does not exist"):
        build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", "broken"), str(tmp_path / "gone.jsonl")])


@pytest.mark.parametrize("rows", [[], [{"question": "q", "answer": "5"}]])
def test_an_empty_dataset_is_an_error_with_the_counts(rows: list[Any], tmp_path: Path, phi35: Any) -> None:
    counts = "no reasoning: 1" if rows else "nothing was rejected"
    with pytest.raises(InputError, match=rf"no training rows are left of {len(rows)} read \({counts}\)"):
        build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", *rows)])


def test_a_row_in_think_form_is_kept_as_it_is(tmp_path: Path, phi35: Any) -> None:
    kept = "# 思考ステップ\n\nThe answer is near.\n\n\n# 最終回答\n\n5."
    build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", {"prompt": "q", "response": f"\u3000{kept}\n"})])
    assert read(tmp_path, "train")[0]["messages"][2]["content"] == kept


def test_own_system_message_is_kept_behind_the_shared_one(tmp_path: Path, phi35: Any) -> None:
    rows = [{**qa(1), "system": "Be brief."}, {"messages": [{"role": "system", "content": "Be kind."}]}]
    rows[1]["messages"] += [{"role": "user", "content": "q"}, {"role": "assistant", "content": THINK}]  # type: ignore[operator]
    build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", *rows)])
    systems = [row["messages"][0]["content"] for row in read(tmp_path, "train")]
    assert systems == [f"{SYSTEM_MESSAGE}\n\nBe brief.", f"{SYSTEM_MESSAGE}\n\nBe kind."]


def test_labels_are_carried_along(tmp_path: Path, phi35: Any) -> None:
    labels = {"four_class_label": "ALLOW", "domain_label": None, "safety_label": 2}
    build(
        tmp_path,
        phi35,
        sources=[write(tmp_path / "a.jsonl", {**qa(1), **labels, "other": 1}, qa(2))],
        safe_labels=["2"],
    )
    first, second = read(tmp_path, "train")
    assert {name: first[name] for name in LABELS} == labels
    assert "other" not in first
    assert not set(LABELS) & set(second)


def test_files_merge_and_exact_duplicates_are_counted(tmp_path: Path, phi35: Any) -> None:
    (tmp_path / "b").mkdir()
    sources = [write(tmp_path / "a.jsonl", qa(1), qa(2), qa(1)), write(tmp_path / "b" / "a.jsonl", qa(2), qa(3))]
    report = build(tmp_path, phi35, sources=sources)
    assert [row["source"] for row in read(tmp_path, "train")] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl#2:2"]
    assert report.duplicates == 2
    assert all(c.read == c.kept + c.duplicates + sum(c.rejected.values()) for c in report.sources.values())


def test_heldout_share_depends_on_content_not_on_order(tmp_path: Path, phi35: Any) -> None:
    rows = [qa(n) for n in range(40)]
    for out, order in (("one", rows), ("two", rows[::-1])):
        build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", *order)], heldout_share=0.25, out=out)
    prompts = [{row["messages"][1]["content"] for row in read(tmp_path, "heldout", out)} for out in ("one", "two")]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 10


def test_a_heldout_prompt_is_never_trained_on(tmp_path: Path, phi35: Any) -> None:
    respelled = {**qa(3), "question": "what is  3 + 1?"}
    sources = [write(tmp_path / "a.jsonl", qa(1), qa(3), respelled)]
    report = build(tmp_path, phi35, sources=sources, heldout_sources=[write(tmp_path / "h.jsonl", qa(3), qa(4))])
    assert [row["source"] for row in read(tmp_path, "train")] == ["a.jsonl:1"]
    assert [row["source"] for row in read(tmp_path, "heldout")] == ["h.jsonl:1", "h.jsonl:2"]
    assert (report.duplicates, report.rejected) == (1, {"prompt is held out": 1})


def test_generated_rows_are_not_trained_on_when_a_file_holds_them_out(tmp_path: Path, phi35: Any) -> None:
    generated, _ = generate(30, 0, ["en"], 0)
    other = [{**row, "steps": f"So: {row['steps']}"} for row in generated]  # the same prompts, no exact duplicates
    report = build(
        tmp_path,
        phi35,
        sources=[write(tmp_path / "a.jsonl", *other)],
        heldout_share=0.2,
        generator=GeneratorConfig(rows=30, heldout_rows=0, languages=["en"]),
        max_tokens=1024,
    )
    assert (report.train_rows, report.heldout_rows, report.rejected) == (48, 6, {"prompt is held out": 6})


def test_same_input_same_bytes_and_another_seed_differs(tmp_path: Path, smollm2: Any) -> None:
    source = write(tmp_path / "a.jsonl", *(qa(n) for n in range(20)))
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        made = GeneratorConfig(rows=60, heldout_rows=30)
        build(tmp_path, smollm2, sources=[source], heldout_share=0.1, generator=made, seed=seed, out=out)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["data_card.md", "heldout.jsonl", "report.json", "train.jsonl"]
    for name in files:
        one, two, three = ((tmp_path / out / name).read_bytes() for out in ("one", "two", "three"))
        assert one == two != three
        assert str(tmp_path).encode() not in one


def test_output_is_accepted_as_input_and_unchanged(tmp_path: Path, phi35: Any) -> None:
    build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", {**qa(1), "safety_label": "safe"})], out="one")
    build(tmp_path, phi35, sources=[str(tmp_path / "one" / "train.jsonl")], out="two")
    assert read(tmp_path, "train", "one")[0] | {"source": "train.jsonl:1"} == read(tmp_path, "train", "two")[0]


def test_generated_rows_pass_the_same_checks_and_can_be_masked(tmp_path: Path, tokenizer: Any) -> None:
    steps = []
    (tmp_path / "out").mkdir()
    config = DataConfig(generator=GeneratorConfig(rows=120, heldout_rows=60), max_tokens=1024)
    report = build_dataset(config, tokenizer, tmp_path / "out", 0, progress=steps.append)
    train, heldout = read(tmp_path, "train"), read(tmp_path, "heldout")
    assert (len(train), len(heldout), sum(steps)) == (120, 60, 180)
    assert not {row["family"] for row in train} & {row["family"] for row in heldout}
    for row in [*train, *heldout]:
        thought = parse(row["messages"][2]["content"])
        assert thought is not None
        assert thought.answer == row["answer"]
        encoded = encode_row(tokenizer, row["messages"], config.max_tokens)
        assert any(label != IGNORED for label in encoded["labels"])
    assert set(report.train.languages) == set(report.heldout.languages) == {"ja", "en"}


def test_generated_rows_are_short_in_the_demo_models_tokens(tmp_path: Path, smollm2: Any) -> None:
    report = build(tmp_path, smollm2, generator=GeneratorConfig(rows=200, heldout_rows=100))
    for split in (report.train, report.heldout):
        assert 80 <= split.quantile(0) <= split.quantile(1) <= 200


def test_the_card_states_the_counts_of_the_report(tmp_path: Path, phi35: Any) -> None:
    rows = [qa(n) for n in range(5)] + [{"question": "q", "answer": "5"}]
    build(
        tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", *rows)], generator=GeneratorConfig(rows=8, heldout_rows=4)
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    card = (tmp_path / "out" / "data_card.md").read_text("utf-8")
    assert (report["train"]["rows"], report["heldout"]["rows"]) == (13, 4)
    for line in (
        "13 training rows and 4 held-out rows",
        "| no reasoning | 1 |",
        "| a.jsonl | 6 | 5 | 0 | 1 |",
        "| generator | MIT | not-applicable |",
    ):
        assert line in card


def test_a_row_without_answer_phrase_is_never_given_reasoning() -> None:
    with pytest.raises(RowError, match="no reasoning"):
        to_think_row({"prompt": "Why?", "response": "Because of the weather, which was bad."}, family="f")
