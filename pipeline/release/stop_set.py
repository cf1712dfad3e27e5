"""Collect every token that ends a turn, and write all of them into generation_config.json.

These places name such tokens: generation_config.json and config.json (a number or a list; transformers uses config.json
where there is no generation_config.json), the tokenizer's eos, and the chat template, which writes a token behind a
reply, the one that training teaches. `complete_stop_set` writes the union into the released checkpoint's
generation_config.json; the GGUF's keys, the Modelfile and the server's stops are made from that file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data.masking import render_row
from pipeline.data.think_form import RowError, chat, format_assistant
from so8t_core.errors import InputError
from so8t_core.files import read_json, write_text
from verification.engines.stop_keys import eos_ids, listed_stops


def stop_ids(directory: Path, tokenizer: Any) -> list[int]:
    """Ids of every token that ends a turn, in order.

    Raises:
        InputError: there is no such token, or a file that names one is damaged.
    """
    ids = listed_stops(directory) | set(eos_ids(directory / "config.json")) | _of_template(tokenizer)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise InputError(f"{directory} names no end-of-sequence token: a model made from it would never stop")
    return sorted(ids)


def complete_stop_set(directory: Path, tokenizer: Any) -> list[int]:
    """Add the ids that only other places name to generation_config.json; returns the added ids.

    A complete file stays as it is, byte for byte. The first id stays first: the converter takes it as the eos.
    """
    path = directory / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    named = path if settings.get("eos_token_id") is not None else directory / "config.json"
    first = eos_ids(named)
    missing = [token for token in stop_ids(directory, tokenizer) if token not in first]
    if missing or (len(first) > 1 and not path.is_file()):  # verification reads generation_config.json alone
        settings["eos_token_id"] = [*first, *missing]
        write_text(path, json.dumps(settings, indent=2) + "\n")
    return missing


def _of_template(tokenizer: Any) -> set[int]:
    """The end-of-turn token that the chat template writes behind a reply; empty if it writes none or refuses a chat."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    reply = {"role": "assistant", "content": format_assistant("one", "two")}
    try:
        row = render_row(tokenizer, [*chat("question"), reply])
    except RowError:
        return set()
    return {row.input_ids[row.answer_end - 1]}
