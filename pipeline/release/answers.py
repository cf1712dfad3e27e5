"""Answer held-out prompts with the shipped file, before and after training, and count right answers.

An answer is in form if it has both /think markers once and in order (or the base's own thinking, where that was
trained), no part is empty, and the model ended its turn itself. It is right if it means the same as the expected
answer: "12", "12.0", "十二", "12 個".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.masking import prompt_text
from pipeline.data.split.markers import final_answer
from pipeline.data.split.tags import take_thinking
from pipeline.data.think_form import RowError, Thought, parse
from pipeline.data.truth.equality import same_answer
from pipeline.release.generate import Completion, complete
from verification.gate.report import AnswerRecord

SAMPLES = 6


def render_prompt(tokenizer: Any, row: dict[str, Any]) -> str:
    """The row's conversation before the last reply, as it was trained and as it is served."""
    return prompt_text(tokenizer, row["messages"], tools=row.get("tools", ()))


def parse_reply(text: str, *, base_form: bool) -> Thought | None:
    """Steps and answer of a generated reply; None where the reply is not in form.

    Args:
        base_form: the base's thinking tags instead of /think markers; the opening tag may stand in the prompt.
    """
    if not base_form:
        return parse(text)
    try:
        found = take_thinking(text)
    except RowError:
        return None
    return Thought(found.steps, found.rest) if found and found.steps and found.rest else None


def judge(completion: Completion, expected: str | None, *, base_form: bool = False) -> tuple[bool, bool]:
    """(in thinking form, right): a right answer means the same as `expected` (`truth.equality`)."""
    thought = parse_reply(completion.text, base_form=base_form) if completion.finished else None
    if thought is None:
        return False, False
    if expected is None:
        return True, False
    given, wanted = (final_answer(text) or text for text in (thought.answer, expected))
    return True, same_answer(given, wanted) or same_answer(thought.answer, expected)


def compare_answers(
    rows: list[dict[str, Any]],
    tokenizer: Any,
    before: Path,
    after: Path,
    *,
    before_name: str,
    max_new_tokens: int,
    parallel: int,
    threads: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> AnswerRecord:
    """Answer every row's prompt with both files and score them.

    Raises:
        InputError: llama.cpp cannot load or run a file.
    """
    prompts = [render_prompt(tokenizer, row) for row in rows]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "parallel": parallel,
        "threads": threads,
        "advance": advance,
    }
    first, second = complete(before, prompts, **options), complete(after, prompts, **options)
    scores_before, scores_after = (
        [
            judge(completion, row.get("answer"), base_form="reasoning_content" in row["messages"][-1])
            for completion, row in zip(completions, rows, strict=True)
        ]
        for completions in (first, second)
    )
    families: dict[str, tuple[int, int, int]] = {}
    for row, (form, exact) in zip(rows, scores_after, strict=True):
        n, f, e = families.get(row.get("family") or "other", (0, 0, 0))
        families[row.get("family") or "other"] = (n + 1, f + form, e + exact)
    count = max(len(rows), 1)
    stride = max(1, len(rows) // SAMPLES)
    return AnswerRecord(
        model_before=before_name,
        model_after=after.name,
        prompts=len(rows),
        form_before=sum(form for form, _ in scores_before) / count,
        form_after=sum(form for form, _ in scores_after) / count,
        exact_before=sum(exact for _, exact in scores_before) / count,
        exact_after=sum(exact for _, exact in scores_after) / count,
        by_family=dict(sorted(families.items())),
        samples=[
            {
                "prompt": next(m["content"] for m in reversed(row["messages"]) if m["role"] == "user"),
                "expected": str(row.get("answer", "")),
                "before": first[i].text,
                "after": second[i].text,
            }
            for i, row in list(enumerate(rows))[::stride][:SAMPLES]
        ],
    )
