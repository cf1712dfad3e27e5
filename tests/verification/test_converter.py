"""The converter is found in a fixed order and refused by name; Phi-3's family stays in general.name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from verification_models import Family

from so8t_core.errors import InputError
from verification.engines.convert import SCRIPT, convert, default_name, find_converter
from verification.gguf.local_paths import local_paths
from verification.gguf.reader import read_gguf


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
    with pytest.raises(InputError, match=r"no config\.json"):
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
