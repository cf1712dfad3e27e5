"""Laws of the configuration: every mistake is named by its key, and the shipped files are valid and fully commented."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import ConfigError, RunConfig, load_config, parse_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))
GENERATED = "data: {generator: {rows: 1, heldout_rows: 1}}\n"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_valid(name: str) -> None:
    load_config(CONFIGS / name)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_comment_every_key(name: str) -> None:
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    bare = [
        line
        for line in lines
        if line.strip() and not line.lstrip().startswith("#") and "#" not in line and not line.endswith(":")
    ]
    allowed = ("generator: {", "pet: {")
    assert [line for line in bare if not line.strip().startswith(allowed)] == []


def _keys(tree: object, prefix: str = "") -> set[str]:
    if not isinstance(tree, dict):
        return set()
    own = {f"{prefix}{key}" for key in tree}
    return own.union(*(_keys(value, f"{prefix}{key}.") for key, value in tree.items()))


def test_demo_config_names_every_key_there_is() -> None:
    shipped = yaml.safe_load((CONFIGS / "demo.yaml").read_text(encoding="utf-8"))
    full = RunConfig.model_validate(shipped).model_dump(mode="json")
    missing = {key for key in _keys(full) - _keys(shipped) if not key.startswith("verify.policy.")}
    assert missing == set()


def test_phi_config_is_the_mission() -> None:
    config = load_config(CONFIGS / "phi35_mini.yaml")
    assert config.train.lora is not None
    assert config.train.pet is not None
    assert (config.train.lora.r, config.train.lora.alpha) == (64, 128)
    assert config.train.lora.targets == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert (config.train.quantization, config.train.init_scale) == ("8bit", 0.05)
    assert (config.train.pet.warmup, config.train.pet.main, config.train.pet.anneal) == (0.01, 0.05, 0.1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GENERATED + "train: {stepz: 3}", ["train.stepz", "unknown key"]),
        (GENERATED + "train: {steps: many}", ["train.steps", "many", "integer"]),
        (GENERATED + "train: {steps: 0}", ["train.steps", "0", "greater than or equal to 1"]),
        (GENERATED + "train: {quantization: 3bit}", ["train.quantization", "3bit", "8bit"]),
        ("train: {steps: 3}", ["sources", "generator"]),
        ("- a\n- b", ["mapping", "list"]),
        ("a: [1", ["not YAML"]),
    ],
)
def test_mistake_is_named_by_key_and_value(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert all(word in message for word in words), message


def test_override_replaces_one_value() -> None:
    config = parse_config(GENERATED, overrides=["train.steps=7", "data.generator.languages=[ja]"])
    assert config.train.steps == 7
    assert config.data.generator is not None
    assert config.data.generator.languages == ["ja"]


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps.x=3", "run_dir=[1"])
def test_bad_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(GENERATED + "train: {steps: 3}", overrides=[override])


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("run_dir: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml cannot be read"):
        load_config(latin)
