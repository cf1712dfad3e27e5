"""The study's runner works from configs to tables on a tiny model, and its tables cannot be made of half a study."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.study.__main__ import main
from benchmarks.study.arms import BASE, STUDY_NAME, load_study
from benchmarks.study.evaluation import check_same_model
from benchmarks.study.report import BEGIN, DOCUMENT, END, FOLDER, tables, with_tables
from benchmarks.study.runs import result_path
from benchmarks.study.statistics import METRICS, paired, paired_shares
from so8t_core.errors import InputError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "study"
KEPT = ROOT / "docs" / FOLDER / "results.json"


def _tiny_configs(folder: Path, base: Path) -> Path:
    """The real arms, cut to a tiny model and two steps."""
    folder.mkdir()
    for path in CONFIGS.glob("*.yaml"):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name == STUDY_NAME:
            raw["run"] |= {
                "model": {"base": str(base)},
                "data": {"generator": {"rows": 8, "heldout_rows": 6}},
                "answers": {"prompts": 2, "max_new_tokens": 8, "parallel": 2},
                "verify": {"chunks": 2, "n_ctx": 64},
            }
            raw["run"]["train"] |= {"steps": 2, "heldout_rows": 4}
            raw |= {"seeds": [0, 1], "comparisons": [["so8t_lora_pet", "oft"]]}
            raw["tuning"]["grid"] = {}
        elif path.stem not in ("base", "oft", "so8t_lora_pet"):
            continue
        (folder / path.name).write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("conversions_remembered")
def test_from_configs_to_tables_and_half_a_study_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs, work, docs = _tiny_configs(tmp_path / "configs", tiny_dir), tmp_path / "work", tmp_path / "docs"
    docs.mkdir()
    (docs / DOCUMENT).write_text(f"# Study\n\n{BEGIN}\n{END}\n\nWords.\n", encoding="utf-8")
    places = ["--configs", str(configs), "--work", str(work), "--docs", str(docs)]

    assert main(["run", "--seeds", "0", *places]) == 0
    assert main(["report", *places]) == 2  # seed 1 is not there
    said = capsys.readouterr().err
    assert "2 of 5 runs are missing: seed 1 oft, seed 1 so8t_lora_pet." in said
    assert not (docs / FOLDER).exists()

    stamps = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    assert main(["run", "--seeds", "0", *places]) == 0  # up to date: nothing is done twice
    assert stamps == {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}

    assert main(["report", "--seeds", "0", *places]) == 0
    text = (docs / DOCUMENT).read_text(encoding="utf-8")
    assert text.startswith("# Study")
    assert text.endswith("Words.\n")
    assert "| PEFT OFT, block 8 | 1,792 |" in text  # 2 layers x 32 blocks x 28, as many as a rotation of SO8T has
    assert "held-out rows, prompts and chunks of the only seed" in text
    assert {p.name for p in (docs / FOLDER).iterdir()} == {
        "results.json",
        "arms.svg",
        "differences.svg",
        "losses.svg",
    }
    results = json.loads((docs / FOLDER / "results.json").read_text(encoding="utf-8"))
    runs = {run["arm"]: run for run in results["runs"]}
    assert len({run["batches"] for name, run in runs.items() if name != BASE}) == 1
    assert runs["oft"]["units"]["heldout_loss"] != runs[BASE]["units"]["heldout_loss"]
    assert all(set(run["units"]) == {metric.key for metric in METRICS} for run in runs.values())

    assert main(["report", "--seeds", "0", "--arms", "oft", *places]) == 0
    part = (docs / DOCUMENT).read_text(encoding="utf-8")
    assert "Not run: SO8T + LoRA + PET." in part
    assert "| SO8T + LoRA + PET |" not in part

    foreign = result_path(work, "oft", 0)  # trained on other rows: no pair
    foreign.write_text(json.dumps(runs["oft"] | {"batches": "0" * 16}), encoding="utf-8")
    assert main(["report", "--seeds", "0", *places]) == 2
    assert "trained on different batches" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_the_trained_model_is_refused() -> None:
    check_same_model("lora", 1.0, 1.01)
    for saved in (1.2, float("nan")):
        with pytest.raises(InputError, match=r"arm lora: .* the merge is wrong"):
            check_same_model("lora", 1.0, saved)


def test_paired_interval_is_students() -> None:
    difference = paired([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    assert difference.mean == pytest.approx(7 / 3)
    assert difference.interval is not None
    assert difference.interval[1] - difference.mean == pytest.approx(4.30265 * 1.5275252 / 3**0.5, rel=1e-5)
    assert not difference.shown
    assert paired([1.0, 1.1, 0.9], [0.0, 0.0, 0.0]).shown
    assert paired([1.0], [0.0]).interval is None
    assert not paired([1.0], [0.0]).shown


def test_all_of_32_is_no_proof_of_all() -> None:
    certain = paired_shares([100.0] * 32, [0.0] * 32, 100)
    assert certain.mean == 100
    assert certain.interval is not None
    assert 80 < certain.interval[0] < 95  # by hand: (32 - 1.96 sqrt(33 - 32^2 / 34)) / 34 = 0.84
    assert certain.interval[1] == 100
    nothing = paired_shares([0.0] * 32, [0.0] * 32, 100)
    assert not nothing.shown
    assert nothing.interval == pytest.approx((-5.77, 5.77), abs=0.01)  # 196 / 34
    assert not paired_shares([100.0, 0.0] * 16, [0.0, 100.0] * 16, 100).shown


def test_an_arm_that_is_wrong_is_named(tmp_path: Path, tiny_dir: Path) -> None:
    folder = _tiny_configs(tmp_path / "configs", tiny_dir)
    (folder / "oft.yaml").write_text("title: x\nmethod: oft\ntrain: {learning_rat: 1}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"oft\.yaml: unknown key `train\.learning_rat`"):
        load_study(folder)
    (folder / "oft.yaml").unlink()
    with pytest.raises(InputError, match=r"names oft, but the arms are base, so8t_lora_pet"):
        load_study(folder)
    (folder / "base.yaml").unlink()
    with pytest.raises(InputError, match=r"needs base\.yaml"):
        load_study(folder)


def test_arms_differ_in_adapter_rate_and_pet_alone() -> None:
    _, arms = load_study(CONFIGS)
    shared = {json.dumps(arm.config.model_dump(exclude={"train"}), sort_keys=True) for arm in arms.values()}
    free = {"lora", "learning_rate", "rotation_learning_rate", "pet"}
    trained = {json.dumps(arm.train.model_dump(exclude=free), sort_keys=True) for arm in arms.values()}
    assert len(shared) == len(trained) == 1
    for name, arm in arms.items():
        if name.endswith("_pet"):
            twin = arms[name.removesuffix("_pet")]
            assert arm.train.pet is not None
            assert arm.train.model_copy(update={"pet": None}) == twin.train


@pytest.mark.skipif(not KEPT.is_file(), reason="the study was not run yet")
def test_the_page_holds_what_the_results_say_and_nothing_is_missing() -> None:
    results: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / DOCUMENT).read_text(encoding="utf-8")
    assert with_tables(page, tables(results)) == page
    less = copy.deepcopy(results)
    less["runs"].remove(next(run for run in less["runs"] if run["arm"] == "so8t"))
    with pytest.raises(InputError, match="no run of arm so8t with seed"):
        tables(less)
    with pytest.raises(InputError, match="lacks the lines"):
        with_tables("no markers", "")
