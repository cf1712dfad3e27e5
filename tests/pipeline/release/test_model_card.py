"""The model card names a licence that somebody stated, or says that it is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config import DEMO_MODEL, ConfigError, RunConfig, parse_config
from pipeline.release.model_card import model_card

STATED = {
    "a card": ("---\nlicense: mit\n---\n# x", "mit"),
    "among other keys": ("---\ntags: [a]\nlicense: apache-2.0\nlanguage: ja\n---\n", "apache-2.0"),
    "a list of one": ("---\nlicense: [cc-by-4.0]\n---\n", "cc-by-4.0"),
    "windows lines": ("---\r\nlicense: mit\r\n---\r\n", "mit"),
    "no card": (None, "unknown"),
    "no header": ("# A model\nlicense: mit\n", "unknown"),
    "only in the text": ("---\ntags: [a]\n---\nlicense: mit\n", "unknown"),
    "several": ("---\nlicense: [mit, apache-2.0]\n---\n", "unknown"),
    "a sentence": ("---\nlicense: free for friends\n---\n", "unknown"),
    "another key hidden in it": ('---\nlicense: "mit\\ntags: [safe]"\n---\n', "unknown"),
    "a header that is no YAML": ("---\nlicense: [\n---\n", "unknown"),
    "not UTF-8": (b"---\nlicense: mit\n---\n\xff", "unknown"),
    "empty": ("", "unknown"),
}


def shown(base: Path, *overrides: str) -> str:
    config = parse_config("data: {generator: {}}", overrides=[f"model.base={base}", *overrides])
    return model_card(config, "x", base, ["x.gguf"], 4096, [])


@pytest.mark.parametrize("kind", ["phi3", "llama"])
@pytest.mark.parametrize(("card", "licence"), STATED.values(), ids=STATED.keys())
def test_the_licence_is_the_stated_one_or_unknown(
    tmp_path: Path, kind: str, card: str | bytes | None, licence: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "_name_or_path": "me/SmolLM2-copy"}))
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    text = shown(tmp_path)
    assert yaml.safe_load(text.split("---")[1])["license"] == licence
    assert ("The licence is unknown" in text) == (licence == "unknown")
    stated = shown(tmp_path, "convert.licence=LicenseRef-Own")
    assert yaml.safe_load(stated.split("---")[1])["license"] == "LicenseRef-Own"
    assert "unknown" not in stated


def test_the_demo_models_licence_is_known(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"data": {"generator": {}}, "model": {"base": DEMO_MODEL}})
    assert "license: apache-2.0" in model_card(config, "x", tmp_path, ["x.gguf"], 4096, [])


def test_a_licence_is_one_word() -> None:
    with pytest.raises(ConfigError, match=r"convert\.licence"):
        parse_config("data: {generator: {}}", overrides=["convert.licence='mit\ntags: [x]'"])
