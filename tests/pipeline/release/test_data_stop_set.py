"""Every end that a checkpoint, its template or the training uses reaches the GGUF, the Modelfile and the server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from template_shapes import SHAPES, shaped

from pipeline.data.masking import IGNORED, encode_row
from pipeline.data.think_form import chat, format_assistant
from pipeline.release.modelfile import modelfile, stop_tokens
from pipeline.release.stop_set import complete_stop_set, stop_ids
from pipeline.tokenizer import load_tokenizer
from so8t_core.errors import InputError

ENDOFTEXT, IM_START, IM_END = 0, 1, 2  # SmolLM2's ids


def place(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


PLACES = {
    "generation_config, a list": ({"generation_config": {"eos_token_id": [IM_END, ENDOFTEXT]}}, [ENDOFTEXT, IM_END]),
    "generation_config, a number": ({"generation_config": {"eos_token_id": ENDOFTEXT}}, [ENDOFTEXT, IM_END]),
    "config, a list, and no generation_config": (
        {"config": {"eos_token_id": [ENDOFTEXT, IM_END]}},
        [ENDOFTEXT, IM_END],
    ),
    "both, apart": (
        {"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": ENDOFTEXT}},
        [ENDOFTEXT, IM_END, 5],
    ),
    "only tokenizer and template": ({}, [IM_END]),
}


@pytest.mark.parametrize("name", PLACES)
def test_every_place_that_names_an_end_counts(name: str, tmp_path: Path, smollm2: Any) -> None:
    files, wanted = PLACES[name]
    folder = place(tmp_path, **files)
    assert stop_ids(folder, smollm2) == wanted
    texts = [smollm2.convert_ids_to_tokens(token) for token in wanted]
    assert stop_tokens(folder, smollm2) == texts
    text = modelfile("m.gguf", folder, smollm2, 4096)
    assert [line for line in text.splitlines() if "stop" in line] == [f'PARAMETER stop "{one}"' for one in texts]
    complete_stop_set(folder, smollm2)
    if len(wanted) > 1:
        listed = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert sorted(listed) == wanted
    assert complete_stop_set(folder, smollm2) == []


def test_a_complete_file_stays_byte_for_byte_and_its_first_end_stays_first(tmp_path: Path, smollm2: Any) -> None:
    folder = place(tmp_path, generation_config={"eos_token_id": [IM_END, ENDOFTEXT], "top_p": 0.9})
    before = (folder / "generation_config.json").read_bytes()
    assert complete_stop_set(folder, smollm2) == []
    assert (folder / "generation_config.json").read_bytes() == before
    place(folder, generation_config={"eos_token_id": ENDOFTEXT, "top_p": 0.9})
    assert complete_stop_set(folder, smollm2) == [IM_END]
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": [ENDOFTEXT, IM_END],
        "top_p": 0.9,
    }


@pytest.mark.parametrize("name", SHAPES)
def test_what_training_teaches_as_the_end_is_in_the_stop_set(name: str, tmp_path: Path, phi35: Any) -> None:
    """The template's end of turn, which no configuration names here."""
    tokenizer = shaped(phi35, name)
    row = [*chat("q"), {"role": "assistant", "content": format_assistant("s", "a")}]
    taught = [label for label in encode_row(tokenizer, row)["labels"] if label != IGNORED][-1]
    assert taught in stop_ids(tmp_path, tokenizer)
    assert tokenizer.convert_ids_to_tokens(taught) == SHAPES[name].end


def test_no_end_at_all_is_refused(tmp_path: Path) -> None:
    class Endless:
        eos_token_id = chat_template = None

    with pytest.raises(InputError, match="never stop"):
        stop_ids(tmp_path, Endless())


def test_llama_cpp_stops_where_only_config_and_template_say_so(tiny_dir: Path, tmp_path: Path) -> None:
    """An end in config.json beside a generation_config.json, a template in chat_template.jinja alone: both arrive."""
    from verification.engines.convert import convert_metadata
    from verification.engines.llama_model import LlamaModel

    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    ends = {"config": config | {"eos_token_id": [IM_END, 7]}, "generation_config": {"eos_token_id": IM_END}}
    place(folder, **ends, tokenizer_config=settings)
    assert (folder / "chat_template.jinja").is_file()
    tokenizer = load_tokenizer(folder)
    with LlamaModel(convert_metadata(folder, tmp_path / "before.gguf"), vocab_only=True) as model:
        assert not model.is_end(7)  # what the step mends
    complete_stop_set(folder, tokenizer)
    with LlamaModel(convert_metadata(folder, tmp_path / "after.gguf"), vocab_only=True) as model:
        assert all(model.is_end(token) for token in (IM_END, 7))
        assert model.chat_template() == tokenizer.chat_template
    assert modelfile("after.gguf", folder, tokenizer, 4096).count("PARAMETER stop") == 2
