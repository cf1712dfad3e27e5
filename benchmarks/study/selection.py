"""Choose a form of the rotation by successive halving at equal parameters, then confirm it on new seeds.

Selection, on separate seeds: on each rung of steps every remaining arm is trained at learning rates a factor of two
apart, until its best rate has a worse neighbour on both sides. The better half of a budget's arms goes on, and always
the best form of SO8T and the best other arm. Confirmation, on the study's seeds: the finalists are trained at their
rate and at neighbours of it. Held-out loss is compared at each arm's rate. Forgetting, the mean KL(base || trained
model) on general text, is compared at equal held-out loss, between points of each arm's curve.
Sources: Jamieson and Talwalkar, Non-stochastic best arm identification (2016); Holm, Scandinavian J. Statistics 6
(1979); Student's paired t over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t
from torch.nn import functional as F

from benchmarks.study.arms import BASE, Arm, Selection
from benchmarks.study.fitting import fit
from benchmarks.study.runs import Workshop, run_one, split_rows
from pipeline.manifest import locked
from pipeline.train.collate import EncodedRows
from pipeline.train.fit import heldout_loss
from so8t_core.errors import InputError
from so8t_core.files import write_text
from verification.logit_parity.text import DEFAULT_CORPUS, read_corpus

POINTS_NAME, FINALISTS_NAME, CONFIRMED_NAME = "points.json", "finalists.json", "confirmed.json"
TEXT_TOKENS = 256


@dataclass(frozen=True)
class Finalists:
    """The finalists of one budget."""

    form: str  # the form of SO8T
    others: list[str]
    rates: dict[str, float]


def best_rate(loss_of: Callable[[float], float], start: float, widest: int) -> float:
    """The best rate among `start` times powers of two, with a worse neighbour on both sides.

    Raises:
        InputError: the loss still falls `widest` factors of two away from the start.
    """
    power = 0
    while True:
        here = loss_of(start * 2.0**power)
        below, above = loss_of(start * 2.0 ** (power - 1)), loss_of(start * 2.0 ** (power + 1))
        if here <= below and here <= above:
            return start * 2.0**power
        power += -1 if below < above else 1
        if abs(power) > widest:
            raise InputError(f"the best learning rate lies beyond {start * 2.0**power:g}; give the arm another start")


def better_half(losses: dict[str, float], is_form: Callable[[str], bool]) -> list[str]:
    """Names of the better half, best first; always with the best form of SO8T and the best other arm."""
    order = sorted(losses, key=lambda name: (losses[name], name))
    kept = set(order[: math.ceil(len(order) / 2)])
    for kind in (True, False):
        kept |= set([name for name in order if is_form(name) == kind][:1])
    return [name for name in order if name in kept]


def at_loss(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """Forgetting at a held-out loss by linear interpolation between neighbouring points (loss, forgetting); NaN where
    the curve does not reach that loss. Of several crossings, the one with the least forgetting counts."""
    found = []
    for (a, f), (b, g) in pairwise(curve):
        if min(a, b) <= loss <= max(a, b):
            found.append(min(f, g) if a == b else f + (g - f) * (loss - a) / (b - a))
    return min(found, default=math.nan)


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of Student's t for a mean of zero; NaN for fewer than two values or one that is not finite."""
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return math.nan
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / spread, len(differences) - 1))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjusted p of a family of tests; a test that could not be made (NaN) counts in the family and stays NaN."""
    adjusted, largest = {}, 0.0
    order = sorted(p_values, key=lambda name: (math.isnan(p_values[name]), p_values[name]))
    for rank, name in enumerate(order):
        value = p_values[name]
        largest = max(largest, min(1.0, (len(order) - rank) * value)) if not math.isnan(value) else largest
        adjusted[name] = math.nan if math.isnan(value) else largest
    return adjusted


@torch.no_grad()
def forgetting(peft: Any, chunks: Sequence[Sequence[int]]) -> float:
    """Mean KL(base || trained model), nats a position, on chunks of ids (n,)."""
    peft.eval()
    total, count = 0.0, 0
    for chunk in chunks:
        ids = torch.as_tensor(chunk)[None]
        after = F.log_softmax(peft(input_ids=ids).logits[0].float(), dim=-1)  # (n, V)
        with peft.disable_adapter():
            before = F.log_softmax(peft(input_ids=ids).logits[0].float(), dim=-1)
        total += F.kl_div(after, before, log_target=True, reduction="sum").item()
        count += len(before)
    return total / count


def at_rate(arm: Arm, rate: float, steps: int) -> Arm:
    """The arm with another learning rate and number of steps; the ratios between its rates stay."""
    changed: dict[str, Any] = {"learning_rate": rate, "steps": steps}
    for key in ("rotation_learning_rate", "scale_learning_rate"):
        own = getattr(arm.train, key)
        if own is not None:
            changed[key] = own * rate / arm.train.learning_rate
    settings = arm.train.model_copy(update=changed)
    return arm.model_copy(update={"config": arm.config.model_copy(update={"train": settings})})


class Points:
    """The stored trainings of the selection or confirmation: (arm, steps, seed, rate) -> measures."""

    def __init__(self, shop: Workshop, folder: Path, plan: Selection, name: str) -> None:
        self.shop, self.plan, self.folder, self.path = shop, plan, folder, folder / name
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []
        self.known: dict[str, dict[str, Any]] = {point["key"]: point for point in known}
        bos = shop.tokenizer.bos_token_id if getattr(shop.tokenizer, "add_bos_token", False) else None
        text = read_corpus(DEFAULT_CORPUS, shop.tokenizer, n_ctx=TEXT_TOKENS, chunks=plan.text_chunks, bos=bos)
        self.chunks = [list(chunk) for chunk in text.chunks]

    def at(
        self, arm: Arm, steps: int, seed: int, rate: float, train: EncodedRows, judged: EncodedRows
    ) -> dict[str, Any]:
        """Train and measure `arm`, unless the result is stored."""
        tuned = at_rate(arm, rate, steps)
        key = f"{self.shop.key(tuned, seed, training_only=True)} {steps} {rate:g}"
        if key not in self.known:
            title = f"{arm.name} {steps} steps {rate:g} seed {seed}"
            work = self.folder / "checkpoints"
            shop = self.shop
            arguments = (shop.base, shop.study.base_dtype, train, judged, shop.collator, seed, work, shop.report, title)
            peft, kept = fit(tuned, *arguments)
            measures = {
                "loss": heldout_loss(peft, judged, shop.collator, arm.train.batch_size),
                "forgetting": forgetting(peft, self.chunks),
                "parameters": kept["parameters"],
                "cpu_seconds": kept["cpu_seconds"],
            }
            self.known[key] = {"key": key, "arm": arm.name, "steps": steps, "seed": seed, "rate": rate, **measures}
            shop.report.note(f"{title}: {measures['loss']:.4f} nats, forgetting {measures['forgetting']:.4f}")
            write_text(self.path, json.dumps(list(self.known.values()), indent=1) + "\n")
        return self.known[key]


def select(shop: Workshop) -> dict[str, Finalists]:
    """Run the selection of every budget and write its finalists.

    Raises:
        InputError: the study has no `selection`, or a best rate lies outside of the search.
    """
    plan = shop.study.selection
    if plan is None:
        raise InputError("study.yaml has no `selection`; configs/study_forms has one")
    folder = shop.work / "selection"
    chosen: dict[str, Finalists] = {}
    with locked(folder):
        points = Points(shop, folder, plan, POINTS_NAME)
        rows = {seed: split_rows(shop, seed) for seed in plan.seeds}
        for budget in dict.fromkeys(arm.budget for arm in shop.arms.values() if arm.budget):
            left = [arm.name for arm in shop.arms.values() if arm.budget == budget]
            rates = {name: shop.arms[name].train.learning_rate for name in left}
            for steps in plan.steps:
                losses = {}
                for name in left:
                    arm = shop.arms[name]

                    def loss_of(rate: float, arm: Arm = arm, steps: int = steps) -> float:
                        return statistics.fmean(points.at(arm, steps, s, rate, *rows[s])["loss"] for s in plan.seeds)

                    rates[name] = best_rate(loss_of, rates[name], plan.widest)
                    losses[name] = loss_of(rates[name])
                left = better_half(losses, lambda name: shop.arms[name].method == "so8t")
            form = next((name for name in left if shop.arms[name].method == "so8t"), None)
            others = [name for name in left if shop.arms[name].method != "so8t"]
            if form is None or not others:
                raise InputError(f"budget {budget} needs a form of SO8T and another arm to be held against")
            chosen[str(budget)] = Finalists(form, others, {name: rates[name] for name in (form, *others)})
        kept = {budget: vars(found) for budget, found in chosen.items()}
        write_text(folder / FINALISTS_NAME, json.dumps(kept, indent=1) + "\n")
    return chosen


def _chosen(shop: Workshop) -> tuple[Selection, Path, dict[str, Any]]:
    """The plan, the selection's folder, and every budget's finalists."""
    plan, folder = shop.study.selection, shop.work / "selection"
    if plan is None or not (folder / FINALISTS_NAME).is_file():
        raise InputError(f"{folder / FINALISTS_NAME} is missing: `python -m benchmarks.study select` makes it")
    return plan, folder, json.loads((folder / FINALISTS_NAME).read_text(encoding="utf-8"))


def evaluate_finalists(shop: Workshop) -> None:
    """Measure the finalists at their rates as `run` does: answers, damage, one record for each run.

    Raises:
        InputError: no selection was made, or the error of an arm.
    """
    plan, _, kept = _chosen(shop)
    for seed in shop.study.seeds:
        for choice in kept.values():
            for name, rate in choice["rates"].items():
                run_one(shop, at_rate(shop.arms[name], rate, plan.steps[-1]), seed)


def confirm(shop: Workshop) -> str:
    """Train the finalists on the study's seeds, at their rate and near it; returns the table of tests.

    Raises:
        InputError: no selection was made.
    """
    plan, folder, kept = _chosen(shop)
    steps = plan.steps[-1]
    found: dict[str, dict[str, dict[int, list[dict[str, Any]]]]] = {}  # budget, arm, seed: points by rate
    with locked(folder):
        points = Points(shop, folder, plan, CONFIRMED_NAME)
        heldout = EncodedRows(shop.heldout, shop.tokenizer, limit=shop.arms[BASE].train.heldout_rows)
        for seed in shop.study.seeds:
            train = EncodedRows(shop.rows(seed) / "train.jsonl", shop.tokenizer)
            for budget, choice in kept.items():
                for name, rate in choice["rates"].items():
                    arm = shop.arms[name]
                    every = [points.at(arm, steps, seed, rate * f, train, heldout) for f in sorted(plan.rate_factors)]
                    found.setdefault(budget, {}).setdefault(name, {})[seed] = every
    return verdict(kept, found)


def verdict(finalists: dict[str, dict[str, Any]], points: dict[str, dict[str, dict[int, list[dict[str, Any]]]]]) -> str:
    """A table of every budget's form against every other finalist, in loss and in forgetting at equal loss.

    All rows together are the family of Holm's correction.
    """
    differences: dict[str, list[float]] = {}
    for budget, choice in finalists.items():
        ours = points[budget][choice["form"]]
        for other in choice["others"]:
            theirs = points[budget][other]
            rates = choice["rates"]
            losses, forgotten = [], []
            for seed in ours:
                a, b = (_own(p[seed], rates[name]) for p, name in ((ours, choice["form"]), (theirs, other)))
                losses.append(a["loss"] - b["loss"])
                level = max(min(p["loss"] for p in side[seed]) for side in (ours, theirs))  # both reach it
                mine, its = (
                    at_loss([(p["loss"], p["forgetting"]) for p in side[seed]], level) for side in (ours, theirs)
                )
                forgotten.append(mine - its)
            pair = f"{budget}: {choice['form']} - {other}"
            differences |= {f"{pair} | held-out loss": losses, f"{pair} | forgetting at equal loss": forgotten}
    adjusted = holm({name: p_value(values) for name, values in differences.items()})
    lines = ["| budget: pair | metric | mean difference, nats | p, Holm | seeds |", "|---|---|---|---|---|"]
    for name, values in differences.items():
        lines.append(f"| {name} | {statistics.fmean(values):+.4f} | {adjusted[name]:.3g} | {len(values)} |")
    return "\n".join(lines) + "\n"


def _own(points: Sequence[dict[str, Any]], rate: float) -> dict[str, Any]:
    return min(points, key=lambda point: abs(math.log(point["rate"] / rate)))
