"""Held-out prompts answered by the shipped file, before and after training, and how many come out right.

In /think form: both markers once and in order, non-empty parts, and the model ended its turn itself. Exactly right: the
answer equals the expected one after NFKC, ends stripped of spaces and one closing full stop, case folded.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.think_form import parse
from pipeline.release.generate import Completion, complete
from verification.gate.report import AnswerRecord

SAMPLES = 6


def normalised(answer: str) -> str:
    """What two answers are compared by."""
    text = unicodedata.normalize("NFKC", answer).strip()
    return (text[:-1].strip() if text.endswith((".", "。")) else text).casefold()


def render_prompt(tokenizer: Any, row: dict[str, Any]) -> str:
    """The row's conversation up to the assistant's turn, as the model's own template writes it."""
    messages = [m for m in row["messages"] if m["role"] != "assistant"]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def judge(completion: Completion, expected: str | None) -> tuple[bool, bool]:
    """(in /think form, exactly right)."""
    thought = parse(completion.text) if completion.finished else None
    if thought is None:
        return False, False
    return True, expected is not None and normalised(thought.answer) == normalised(expected)


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
    scores_before = [judge(c, row.get("answer")) for c, row in zip(first, rows, strict=True)]
    scores_after = [judge(c, row.get("answer")) for c, row in zip(second, rows, strict=True)]
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
                "prompt": next(m["content"] for m in row["messages"] if m["role"] == "user"),
                "expected": str(row.get("answer", "")),
                "before": first[i].text,
                "after": second[i].text,
            }
            for i, row in list(enumerate(rows))[::stride][:SAMPLES]
        ],
    )
