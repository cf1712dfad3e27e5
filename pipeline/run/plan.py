"""`so8t run --dry-run`: show each step, its estimated cost, and every problem that would stop it.

It writes nothing and reads no weights except to check the digests of finished steps. A step is up to date, would run
(with the reason), or waits for an earlier step. A problem would end the run with an error; a note is information for
the reader. `estimate` makes the estimates.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import hub
from pipeline.config import DEMO_MODEL
from pipeline.data.inputs import expected_rows
from pipeline.run.estimate import Cost, Machine, Shape, costs, mean_length, shape_of, this_machine
from pipeline.run.refuse import missing_tools, missing_weights
from so8t_core.checkpoint_admission import admit_config
from so8t_core.errors import InputError
from so8t_core.files import sha256_path

if TYPE_CHECKING:
    from pipeline.run.steps import Run

NETWORK = 2e7  # bytes a second from the hub
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")


@dataclass(frozen=True)
class StepPlan:
    """One step: whether it runs and why, and its estimate (zero where it does not run)."""

    name: str
    state: str
    runs: bool
    cost: Cost


@dataclass
class Plan:
    """The whole answer of a dry run."""

    steps: list[StepPlan] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    basis: str = ""


def make_plan(run: Run, *, first: str | None = None, until: str | None = None, force: tuple[str, ...] = ()) -> Plan:
    """Resolve a run as `Run.execute` would with the same arguments.

    Raises:
        InputError: an unknown step.
    """
    from pipeline.run.steps import STEPS, check_early, check_steps

    check_steps(first, until, force)
    last = STEPS.index(until) if until else len(STEPS) - 1
    plan = Plan()
    _try(plan, lambda: check_early(run.config, last))
    base = _try(plan, lambda: _base(run, plan)) or _Base(Path(run.config.model.base), None, "not here", False)
    run.base_dir = base.directory
    again = set(force) | (set(STEPS[STEPS.index(first) :]) if first else set())
    states = {"base": base.state, **_states(run, STEPS[1 : last + 1], again, base.complete)}
    estimates: dict[str, Cost] = {}
    rows = _try(plan, lambda: expected_rows(run.config.data)) or 0
    shape = None
    if base.small is not None:
        small, gguf = base.small, base.gguf
        tokenizer = _try(plan, lambda: _tokenizer(small, gguf))
        shape = _try(plan, lambda: shape_of(small, run.config.train, gguf=gguf))
        if shape is not None:
            machine = this_machine(run.config.threads)
            tokens = mean_length(run.config, tokenizer)
            estimates = costs(run.config, shape, machine, rows=rows, tokens=tokens)
            fetched = shape.parameters * shape.stored if base.fetched else 0.0
            estimates["base"] = Cost(fetched / NETWORK, 0, 0, fetched)
            plan.basis = _basis(shape, machine, tokens)
            _look_at_model(run, shape, small, plan)
    problems, notes = missing_tools(run.config, shape, converts=last >= STEPS.index("convert"))
    plan.problems += problems
    plan.notes += notes
    for name, state in states.items():
        runs = state != "up to date"
        plan.steps.append(StepPlan(name, state, runs, estimates.get(name, Cost()) if runs else Cost()))
    _look_at_room(run, plan)
    return plan


@dataclass(frozen=True)
class _Base:
    directory: Path  # the base's directory in the run
    small: Path | None  # the directory that has config.json and the tokenizer now
    state: str
    complete: bool
    fetched: bool = False
    gguf: str | None = None  # the file that config and tokenizer are read from


def _base(run: Run, plan: Plan) -> _Base:
    """The base, as far as this machine has it."""
    named = run.config.model.base
    if named == DEMO_MODEL:
        from pipeline.base_model import demo_file

        ready = run.dir / "base"
        if (ready / "config.json").is_file():
            return _Base(ready, ready, "up to date", True)
        file = demo_file()
        return _Base(ready, file.parent, "would unpack the demo model", False, gguf=file.name)
    directory = Path(named)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise InputError(
                f"model.base = {named}: the directory has no config.json, so it is no Hugging Face checkpoint"
            )
        admit_config(directory)
        missing = missing_weights(directory)
        plan.problems += missing
        return _Base(directory, directory, "incomplete" if missing else "up to date", not missing)
    return _on_the_hub(named, plan)


def _on_the_hub(named: str, plan: Plan) -> _Base:
    """The base of a hub id, from the cache; if files are missing, only the small ones are fetched."""
    from huggingface_hub import constants

    here = hub.snapshot(named, None, list(SMALL_FILES), named=f"model.base = {named!r}")
    admit_config(here)
    missing = missing_weights(here)
    if not missing:
        return _Base(here, here, "up to date", True)
    if constants.HF_HUB_OFFLINE:
        plan.problems += [f"model.base = {named!r}: {missing[0]}, and HF_HUB_OFFLINE forbids to fetch it"]
    return _Base(here, here, "would fetch the weights", False, fetched=True)


def _tokenizer(directory: Path, gguf: str | None) -> Any:
    if gguf is None:
        from pipeline.tokenizer import load_tokenizer

        return load_tokenizer(directory)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, gguf_file=gguf, trust_remote_code=False)


def _states(run: Run, names: tuple[str, ...], again: set[str], base_complete: bool) -> dict[str, str]:
    """The state of each step, with the reason why it would run; digests are computed for finished steps only."""
    from pipeline.manifest import load_manifest
    from pipeline.run.steps import WORK

    manifest = load_manifest(run.dir)
    states: dict[str, str] = {}
    made: dict[Path, str] = {}  # outputs of steps that run
    for name in names:
        step, record = WORK[name], manifest.steps.get(name)
        inputs: dict[str, str] = {}
        waits = []
        if record is None and name not in again:
            states[name] = "not done yet"
        elif name in again:
            states[name] = "forced"
        else:
            for label, path in step.inputs(run).items():
                if path in made:
                    waits.append(made[path])
                elif path.exists() and (path != run.base_dir or base_complete):
                    inputs[label] = sha256_path(path)
            if waits:
                states[name] = f"if {waits[0]} gives something else"
            else:
                states[name] = manifest.why_stale(name, step.settings(run.config), inputs, run.dir) or "up to date"
        if states[name] != "up to date":
            made |= {run.dir / output: name for output in step.outputs}
    return states


def _look_at_model(run: Run, shape: Shape, directory: Path, plan: Plan) -> None:
    """Add notes on properties of this model's shape that the gate will report."""
    from pipeline.release.gguf_files import released_n_ctx

    kinds = [kind.upper() for kind in run.config.convert.types]
    mixed = [kind for kind in kinds if "_K" in kind or kind.startswith("IQ")]
    odd = sorted({width for width in (shape.hidden, shape.intermediate) if width % 256})
    if mixed and odd:
        policy = run.config.verify.policy
        contract = policy.get("contract", {}) if isinstance(policy, dict) else {}
        allowed = contract.get("allow_fallback_types", True)
        so = "the policy allows it" if allowed else "the policy refuses that: contract.allow_fallback_types is false"
        plan.notes.append(
            f"{', '.join(mixed)}: rows of {', '.join(map(str, odd))} are no multiples of 256, so llama.cpp takes other "
            f"types there; {so}"
        )
    if (directory / "config.json").is_file():
        pinned = released_n_ctx(run.config, directory)
        if pinned < run.config.convert.n_ctx:
            plan.notes.append(f"LongRoPE: the Modelfile will say num_ctx {pinned}, not {run.config.convert.n_ctx}")


def _look_at_room(run: Run, plan: Plan) -> None:
    """Compare free disk and memory with the estimates."""
    place = run.dir
    while not place.exists():
        place = place.parent
    needed, free = sum(step.cost.disk for step in plan.steps), shutil.disk_usage(place).free
    if needed > free:
        plan.problems.append(
            f"{place} has {free / 1e9:.1f} GB free, the run needs about {needed / 1e9:.1f} GB; free some or choose "
            "another run_dir"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for step in plan.steps:
        if step.cost.host > memory:
            plan.notes.append(
                f"{step.name} needs about {step.cost.host / 1e9:.1f} GB of memory, this machine has {memory / 1e9:.1f}"
            )
    gpu = _gpu_memory()
    for step in plan.steps:
        if gpu and step.cost.gpu > gpu:
            plan.notes.append(
                f"{step.name} needs about {step.cost.gpu / 1e9:.1f} GB on the GPU, it has {gpu / 1e9:.1f}"
            )


def _gpu_memory() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def _try(plan: Plan, check: Any) -> Any:
    """The check's result; an `InputError` becomes a problem of the plan."""
    try:
        return check()
    except InputError as error:
        plan.problems.append(str(error))
        return None


def _basis(shape: Shape, machine: Machine, tokens: float) -> str:
    where = "the GPU" if machine.cuda else f"{machine.threads} CPU thread{'s' * (machine.threads > 1)}"
    return (
        f"Estimates, not measurements: {shape.name}, {shape.parameters / 1e9:.3g} B parameters, "
        f"{shape.trainable / 1e6:.3g} M trainable, rows of {tokens:.0f} tokens, {machine.device / 1e9:.0f} GFLOP/s on "
        f"{where} (timed just now). Memory is for a batch of the longest rows."
    )
