"""The selection finds what is best where the answer is known, keeps to its seeds, and is done once."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from scipy.stats import ttest_1samp
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.study.__main__ import main
from benchmarks.study.arms import STUDY_NAME, load_study
from benchmarks.study.fitting import with_adapter
from benchmarks.study.selection import at_loss, best_rate, better_half, holm, p_value, verdict
from so8t_core.errors import InputError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "study_forms"
BUDGETS = {"60k": 60_480, "350k": 342_720}


@pytest.mark.parametrize("best", [-4, -1, 0, 3])
def test_the_rate_has_a_worse_neighbour_on_both_sides(best: int) -> None:
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return (math.log2(rate / 1e-3) - best) ** 2

    assert best_rate(loss, 1e-3, 5) == pytest.approx(1e-3 * 2.0**best)
    assert {1e-3 * 2.0 ** (best - 1), 1e-3 * 2.0 ** (best + 1)} <= set(asked)


def test_a_rate_outside_of_the_search_is_no_result() -> None:
    with pytest.raises(InputError, match="best learning rate lies beyond"):
        best_rate(lambda rate: -rate, 1e-3, 3)


def test_the_better_half_keeps_one_of_each_kind() -> None:
    losses = {"a": 1.0, "b": 2.0, "c": 3.0, "so8t": 9.0, "so8t_2": 8.0}
    assert better_half(losses, lambda name: name.startswith("so8t")) == ["a", "b", "c", "so8t_2"]
    assert better_half({"so8t": 1.0, "so8t_2": 2.0, "a": 3.0, "b": 4.0}, lambda n: n.startswith("so8t")) == [
        "so8t",
        "so8t_2",
        "a",
    ]


def test_forgetting_is_read_between_points_of_a_curve() -> None:
    curve = [(1.0, 0.1), (0.5, 0.3), (0.7, 0.9)]  # by rate: the loss falls, then rises again
    assert at_loss(curve, 0.75) == pytest.approx(0.2)
    assert at_loss(curve, 0.6) == pytest.approx(0.26)  # the other crossing forgets more
    assert at_loss(curve, 0.5) == pytest.approx(0.3)
    assert math.isnan(at_loss(curve, 0.4))


def test_p_and_holm_are_the_textbook_s() -> None:
    values = [0.1, 0.3, 0.2, 0.5]
    assert p_value(values) == pytest.approx(ttest_1samp(values, 0).pvalue)
    assert math.isnan(p_value([0.1]))
    assert math.isnan(p_value([0.1, math.nan]))
    # Holm (1979): 0.01 x 4, then 0.02 x 3, 0.03 x 2, 0.04 x 1, made monotone
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.02}) == pytest.approx(
        {"b": 0.04, "d": 0.06, "c": 0.06, "a": 0.06}
    )
    with_gap = holm({"a": 0.01, "b": math.nan})
    assert with_gap["a"] == pytest.approx(0.02)  # what could not be tested still counts
    assert math.isnan(with_gap["b"])


def test_the_verdict_pairs_seeds_and_compares_forgetting_at_equal_loss() -> None:
    choice = {"form": "so8t", "others": ["lora"], "rates": {"so8t": 1.0, "lora": 1.0}}
    points = {
        "60k": {
            name: {
                seed: [
                    {"rate": rate, "loss": loss + shift + 0.01 * seed, "forgetting": forgotten}
                    for rate, loss, forgotten in ((0.5, 0.6, 0.1), (1.0, 0.4, 0.3))
                ]
                for seed in range(3)
            }
            for name, shift in (("so8t", 0.0), ("lora", 0.1))
        }
    }
    rows = verdict({"60k": choice}, points).splitlines()[2:]
    assert "held-out loss | -0.1000 |" in rows[0]
    assert "forgetting at equal loss | -0.1000 |" in rows[1]  # at the loss that both reach: 0.2 against 0.3


def test_arms_of_a_budget_have_about_as_many_parameters() -> None:
    """SmolLM2's widths in two of its thirty layers; every arm within 15 % of the rotation of its budget."""
    _, arms = load_study(CONFIGS)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    forms = 0
    for arm in arms.values():
        if arm.budget is None:
            continue
        torch.manual_seed(0)
        model = with_adapter(LlamaForCausalLM(config), arm)
        count = 15 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == pytest.approx(BUDGETS[arm.budget], rel=0.15), arm.name
        forms += arm.method == "so8t"
    assert forms >= 7
    assert {arm.budget for arm in arms.values()} == {None, *BUDGETS}


def test_seeds_of_selection_and_confirmation_are_apart(tmp_path: Path) -> None:
    for path in CONFIGS.glob("*.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = yaml.safe_load((tmp_path / STUDY_NAME).read_text())
    raw["selection"]["seeds"] = [0, 3000]
    (tmp_path / STUDY_NAME).write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError, match=r"selection\.seeds must all differ"):
        load_study(tmp_path)


@pytest.mark.soak
def test_selection_and_confirmation_run_and_resume(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs, work = tmp_path / "configs", tmp_path / "work"
    configs.mkdir()
    for name in ("base", "so8t_o", "lora_o", STUDY_NAME.removesuffix(".yaml")):
        raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        if name == "study":
            raw["run"] |= {"model": {"base": str(tiny_dir)}, "data": {"generator": {"rows": 24, "heldout_rows": 4}}}
            raw["run"]["train"] |= {"steps": 2, "heldout_rows": 2}
            raw |= {"seeds": [0, 1], "base_dtype": "float32"}
            raw["selection"] |= {
                "seeds": [3000],
                "steps": [1, 2],
                "text_chunks": 2,
                "widest": 12,
                "rate_factors": [0.5, 1.0],
            }
            raw["tuning"]["validation_rows"] = 2
            raw["run"]["train"]["warmup_share"] = 0.0
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    places = ["--configs", str(configs), "--work", str(work), "--docs", str(tmp_path)]
    assert main(["confirm", *places]) == 2
    assert "finalists.json is missing" in capsys.readouterr().err
    assert main(["select", *places]) == 0
    chosen = json.loads((work / "selection" / "finalists.json").read_text())["60k"]
    assert (chosen["form"], chosen["others"]) == ("so8t_o", ["lora_o"])
    points = json.loads((work / "selection" / "points.json").read_text())
    assert {point["seed"] for point in points} == {3000}
    for name, rate in chosen["rates"].items():  # the best of the last rung, with both neighbours
        last = {p["rate"]: p["loss"] for p in points if p["arm"] == name and p["steps"] == 2}
        assert {rate / 2, rate * 2} <= set(last)
        assert last[rate] == min(last[rate / 2], last[rate], last[rate * 2])
    before = (work / "selection" / "points.json").stat().st_mtime_ns
    assert main(["select", *places]) == 0
    assert (work / "selection" / "points.json").stat().st_mtime_ns == before  # nothing is trained twice
    capsys.readouterr()
    assert main(["confirm", *places]) == 0
    shown = capsys.readouterr().out
    assert "| 60k: so8t_o - lora_o | held-out loss |" in shown
    confirmed = json.loads((work / "selection" / "confirmed.json").read_text())
    assert {(p["arm"], p["seed"]) for p in confirmed} == {(a, s) for a in ("so8t_o", "lora_o") for s in (0, 1)}
    assert statistics.fmean(p["forgetting"] for p in confirmed) > 0
