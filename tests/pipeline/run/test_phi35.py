"""Phi-3.5's road on a true miniature: the shipped configuration passes the gate, and each trap of that road shows
in a test where our handling of it is taken away. The list of traps is in docs/phi35.md."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from phi3_miniature import STOPS, MiniatureRun, Size, miniature_run, save_miniature

from pipeline.data.rows import to_think_row
from pipeline.data.think_form import format_assistant
from pipeline.release.gguf_files import released_n_ctx
from pipeline.serve.engine_llama import LlamaEngine
from pipeline.serve.history import conversation
from pipeline.serve.protocol import parse_request
from so8t_core.errors import InputError
from so8t_core.files import sha256_file
from verification import decide
from verification.contract import chat, tokens
from verification.contract.metadata import unused_window
from verification.engines.convert import convert_metadata, default_name
from verification.engines.llama_model import LlamaModel
from verification.fault_catalogue.edit import set_metadata
from verification.gate.policy import make_policy
from verification.gguf.reader import read_gguf
from verification.reference.checkpoint import read_config
from verification.reference.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(phi35_run: MiniatureRun) -> Any:
    return load_tokenizer(phi35_run.base)


# --- the run


def test_the_shipped_configuration_passes_the_gate_with_every_file(phi35_run: MiniatureRun) -> None:
    report = phi35_run.report
    assert report.verdict == "pass", report.summary
    assert {leg.name for leg in report.legs} == set(make_policy({}).required) | {
        "bake",
        "dtype",
        "quantise",
        "quality",
        "controls",
        "evidence",
        "cells",
    }
    types = json.loads((phi35_run.dir / "gguf" / "types.json").read_text(encoding="utf-8"))
    assert [list(row["fallbacks"]) for row in types.values()] == [[], [], []]
    q4 = next(row["counts"] for name, row in types.items() if name.endswith("-Q4_K_M.gguf"))
    assert set(q4) == {"F32", "Q4_K", "Q6_K"}  # a true Q4_K_M
    assert q4["Q4_K"] >= 7


def test_every_file_of_the_base_that_is_no_weights_comes_through_byte_for_byte(phi35_run: MiniatureRun) -> None:
    names = {path.name for path in phi35_run.base.iterdir()}
    assert names >= {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
        "generation_config.json",
        "config.json",
        "model.safetensors.index.json",
        "modeling_phi3.py",
        "LICENSE",
    }
    for name in names - {path.name for path in phi35_run.base.glob("*.safetensors")}:
        assert sha256_file(phi35_run.dir / "baked" / name) == sha256_file(phi35_run.base / name), name


# --- trap 1: general.name decides how the special tokens swallow spaces


def test_a_base_that_is_not_named_phi_still_tokenises_as_phi(
    phi35_run: MiniatureRun, tokenizer: Any, tmp_path: Path
) -> None:
    file = phi35_run.file("F16")
    name = read_gguf(file).metadata["general.name"]
    assert name == "Phi-3-my-assistant-so8t"
    with LlamaModel(file, vocab_only=True) as model:
        assert chat_ids(tokenizer, model) == []
    planted = set_metadata(file, tmp_path / "f.gguf", {"general.name": "my-assistant-so8t"})
    with LlamaModel(planted, vocab_only=True) as model:
        assert len(chat_ids(tokenizer, model)) >= 10  # every chat has a newline behind its markers


def chat_ids(tokenizer: Any, model: LlamaModel) -> list[Any]:
    chats = [chat for chat in chat.render_both(tokenizer, model) if not chat.starts_with_unicode_space]
    return chat.rendered_ids(tokenizer, model, chats)


# --- trap 2: Unicode spaces at the start of a message

SPACED = "\u3000全角の空白で始まる。"


def ids_differ(tokenizer: Any, model: LlamaModel, messages: list[dict[str, str]]) -> bool:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return bool(tokenizer(text, add_special_tokens=False).input_ids != model.tokenize(text))


def test_the_data_step_and_the_server_take_leading_unicode_spaces_away(phi35_run: MiniatureRun, tokenizer: Any) -> None:
    row = to_think_row({"prompt": SPACED, "response": format_assistant("\u30001 + 1 = 2", "\u30002")}, family="f")
    body = {"messages": [{"role": "system", "content": SPACED}, {"role": "user", "content": SPACED}]}
    served = conversation(parse_request(json.dumps(body).encode()).messages, instructs=True)
    with LlamaModel(phi35_run.file("F16"), vocab_only=True) as model:
        assert ids_differ(tokenizer, model, [{"role": "user", "content": SPACED}])  # as it came: two functions
        assert not ids_differ(tokenizer, model, list(row.messages))
        assert not ids_differ(tokenizer, model, served)


# --- trap 3: LongRoPE's factors follow the allocated context


def test_what_is_shipped_stays_within_the_original_length(phi35_run: MiniatureRun) -> None:
    modelfile = (phi35_run.dir / "gguf" / "Modelfile").read_text(encoding="utf-8")
    assert "PARAMETER num_ctx 4096\n" in modelfile
    assert "4096 tokens or below" in (phi35_run.dir / "gguf" / "README.md").read_text(encoding="utf-8")
    for wanted, given in ((8192, 4096), (131072, 4096), (2048, 2048)):
        asked = miniature_run(phi35_run.base, phi35_run.dir, f"convert.n_ctx={wanted}")
        assert released_n_ctx(asked, phi35_run.base) == given


def test_the_server_allocates_no_more_than_the_original_length(phi35_run: MiniatureRun, tmp_path: Path) -> None:
    file = Path(shutil.copy(phi35_run.file("Q8_0"), tmp_path / "m-Q8_0.gguf"))
    file.with_suffix(".Modelfile").write_text("FROM ./m-Q8_0.gguf\nPARAMETER num_ctx 8192\n", encoding="utf-8")

    async def opened() -> int:
        engine = LlamaEngine(file, max_new_tokens=16)
        await engine.close()
        return engine.n_ctx

    assert asyncio.run(opened()) == 4096
    with pytest.raises(InputError, match=r"--n-ctx 8192 is above 4096, the original length.*give 4096 or less"):
        LlamaEngine(file, n_ctx=8192, max_new_tokens=16)


def test_the_cell_above_the_original_length_shows_what_would_happen(phi35_run: MiniatureRun) -> None:
    found = {
        c.name: c for leg in phi35_run.report.legs if leg.name == "cells" for c in leg.checks if c.subject == "F16"
    }
    above, shipped = found["cells.n_ctx_larger.mean_kld"], found["cells.n_ctx_shipped.mean_kld"]
    assert above.status == "waived"
    assert "LongRoPE factor choice" in above.detail
    assert float(above.value or 0) > 1000 * float(shipped.value or 1)  # measured: 0.08 against 1e-7
    policy = make_policy({**phi35_run.report.policy, "waivers": []})
    assert decide(phi35_run.report, policy).verdict == "fail"


# --- trap 4: tokenizer.model and add_bos_token


def test_a_tokenizer_saved_again_breaks_the_conversion(phi35_run: MiniatureRun, tokenizer: Any, tmp_path: Path) -> None:
    """What copying byte for byte avoids: `save_pretrained` leaves tokenizer.model out, and the converter needs it."""
    again = copied(phi35_run.base, tmp_path / "again", "tokenizer.model", "tokenizer_config.json", "added_tokens.json")
    tokenizer.save_pretrained(again)
    assert not (again / "tokenizer.model").exists()
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        convert_metadata(again, tmp_path / "again.gguf")


def test_add_bos_token_lost_on_the_way_doubles_the_beginning(
    phi35_run: MiniatureRun, tokenizer: Any, tmp_path: Path
) -> None:
    with LlamaModel(phi35_run.file("F16"), vocab_only=True) as model:
        assert not model.add_bos
        assert tokens.added_specials(tokenizer, model) == []
    lost = copied(phi35_run.base, tmp_path / "lost")
    fields = json.loads((lost / "tokenizer_config.json").read_text(encoding="utf-8"))
    del fields["add_bos_token"]
    (lost / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    with LlamaModel(convert_metadata(lost, tmp_path / "lost.gguf"), vocab_only=True) as model:
        (found,) = tokens.added_specials(tokenizer, model)
    assert "double or missing BOS" in found.sentence


def copied(base: Path, target: Path, *without: str) -> Path:
    """The base without some files."""
    return Path(shutil.copytree(base, target, ignore=shutil.ignore_patterns(*without)))


# --- trap 6: the stop set is a list


def test_all_three_stops_reach_the_files_the_modelfile_and_the_server(
    phi35_run: MiniatureRun, tokenizer: Any, tmp_path: Path
) -> None:
    wanted = tokenizer.convert_tokens_to_ids(list(STOPS))
    modelfile = (phi35_run.dir / "gguf" / "Modelfile").read_text(encoding="utf-8")
    assert all(f'PARAMETER stop "{name}"\n' in modelfile for name in STOPS)
    for kind in ("F16", "Q8_0", "Q4_K_M"):
        with LlamaModel(phi35_run.file(kind), vocab_only=True) as model:  # the server asks `is_end` after every token
            assert [model.is_end(token) for token in wanted] == [True, True, True], kind
    planted = set_metadata(phi35_run.file("F16"), tmp_path / "f.gguf", {"tokenizer.ggml.eom_token_id": None})
    with LlamaModel(planted, vocab_only=True) as model:
        (found,) = tokens.stop_set(phi35_run.base, tokenizer, model)
    assert "<|assistant|>" in found.where
    assert found.found == "llama.cpp goes on"


# --- trap 7: no sliding window to lose


def test_phi35s_window_is_longer_than_its_context(phi35_run: MiniatureRun, tmp_path: Path) -> None:
    lost = set_metadata(phi35_run.file("F16"), tmp_path / "f.gguf", {"phi3.attention.sliding_window": None})
    config = read_config(phi35_run.base)
    assert unused_window(config, read_gguf(lost)) is None
    assert unused_window({**config, "sliding_window": 2047}, read_gguf(lost)) == 2047  # Phi-3-mini-4k's


# --- trap 9: no remote code


def test_the_remote_code_beside_the_weights_was_never_imported(phi35_run: MiniatureRun, tmp_path: Path) -> None:
    config = json.loads((phi35_run.dir / "baked" / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" in config  # the temptation was there, in base and baked
    assert not phi35_run.canary.exists()
    planted = save_miniature(tmp_path / "base", Size(layers=1), canary=tmp_path / "canary", weights=False)
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(planted)!r}, trust_remote_code=True)"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        check=True,
        cwd=tmp_path,
    )
    assert (tmp_path / "canary").read_text() == "configuration_phi3"


def test_the_name_that_is_given_keeps_a_name_that_has_it(tmp_path: Path) -> None:
    planted = save_miniature(tmp_path / "base", Size(layers=1), weights=False)
    assert default_name(planted) == "Phi-3.5-mini-instruct"
