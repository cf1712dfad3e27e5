"""The `so8t` command. Exit codes: 0 passed or done, 1 not to be released, 2 bad input or could not run.

Heavy imports happen inside the verbs, so that `--help` and a mistyped path answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from pipeline.cli.serve_verbs import audit_app, serve
from so8t_core.errors import InputError
from verification.engines import distributed

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from verification.gate.report import Report


class _Verbs(TyperGroup):
    """Help without the section that only says `--help`: all verbs on one screen of 24 lines."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Only the verbs."""
        self.format_commands(ctx, formatter)


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train an SO(8) rotation, ship a GGUF, prove that it is what was trained.",
    epilog="Exit codes: 0 passed, 1 not to be released, 2 bad input. Example: so8t demo",
)

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="run configuration; see configs/", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. train.steps=100", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


def main() -> None:
    """Entry point of the `so8t` program."""
    _calm()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)  # without standalone mode `typer.Exit(1)` comes back as a return value
        if code == 130:  # and so does ctrl-C inside a verb
            raise KeyboardInterrupt
        sys.exit(code)
    except InputError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt, _Interrupted) as error:
        kept = str(error) if isinstance(error, _Interrupted) else "finished steps are kept"
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"interrupted; {kept}", markup=False)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ModuleNotFoundError as error:
        what = f"the package {error.name!r} is not installed" if error.name else str(error)  # transformers names none
        _fail(f"{what}; `so8t doctor` says what is missing and how to get it")
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _fail(f"{error.format_message()} (so8t --help shows the verbs, so8t VERB --help its options)")
        traceback.print_exc()  # a fault of ours: shown whole, but as "could not run", never as "not to be released"
        sys.exit(2)


class _Interrupted(Exception):
    """Ctrl-C inside a verb that says what is left of its work."""


def _fail(message: str) -> None:
    try:
        number = distributed.rank()
    except InputError:  # the launch's variables are what is wrong, and the message says so
        number = 0
    who = f"so8t (process {number})" if number else "so8t"  # in a launch of several processes each reports its errors
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"{who}: {message}", markup=False)
    sys.exit(2)


def _calm() -> None:
    """Keep other libraries' chatter off the screen; their errors still raise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # loaders draw bars of their own; `Reporter` shows the progress here
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # says at import which optional kernels it lacks
    # peft 0.21.2 reads a name that transformers 5.23 deprecates; TrainingArguments likewise renames its own options.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is deprecated and will be removed in v6.*")


def _quiet_transformers() -> None:
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()


def _execute(
    config: Path | str, overrides: list[str] | None, *, first: str | None = None, until: str | None = None,
    force: list[str] | None = None, quiet: bool = False,
) -> None:  # fmt: skip
    from pipeline.config import load_config, parse_config

    loaded = parse_config(config, overrides=overrides) if isinstance(config, str) else load_config(config, overrides)
    _quiet_transformers()
    from pipeline.progress import Reporter
    from pipeline.run.steps import Run

    run = Run(loaded, Reporter(quiet=quiet))
    report = run.execute(first=first, until=until, force=tuple(force or ()))
    if report is not None:
        _announce(report, run.report, speaks=distributed.is_first())


def _plan(
    config: Path, overrides: list[str] | None, *, first: str | None, until: str | None, force: list[str] | None
) -> None:
    """The plan on standard output; exit code 2 when something speaks against it."""
    from pipeline.config import load_config

    loaded = load_config(config, overrides)
    _quiet_transformers()
    from pipeline.progress import Reporter
    from pipeline.run.plan import make_plan
    from pipeline.run.plan_table import plan_table
    from pipeline.run.steps import Run

    plan = make_plan(Run(loaded, Reporter(quiet=True)), first=first, until=until, force=tuple(force or ()))
    console = Console(highlight=False)
    console.print(plan_table(plan))
    for line in (plan.basis, *(f"Note: {note}" for note in plan.notes)):
        console.print(line, markup=False)
    if plan.problems:
        raise InputError("\nso8t: ".join(plan.problems))


def _announce(report: Report, folder: Path, *, speaks: bool = True) -> None:
    """Verdict table, the report's path, and the exit code that follows.

    Args:
        speaks: print; in a launch of several processes the first one does, and all exit by the verdict.
    """
    if speaks:
        from verification.show.github import append_step_summary
        from verification.show.terminal import verdict_table

        append_step_summary(report)
        console = Console(highlight=False)
        console.print(verdict_table(report))
        console.print(f"Report: {folder / 'report.html'}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if report.verdict == "pass" else 1)


@app.command(epilog="Example: so8t demo run_dir=/tmp/so8t train.steps=80")
def demo(overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train, bake, convert and verify a real 135M model."""
    text = (Path(__file__).parents[1] / "configs" / "demo.yaml").read_text(encoding="utf-8")
    if not quiet and distributed.is_first():
        from pipeline.config import parse_config

        Console(highlight=False).print(_what_the_demo_shows(parse_config(text, overrides=overrides)), markup=False)
    _execute(text, overrides, quiet=quiet)


def _what_the_demo_shows(config: RunConfig) -> str:
    """The plan of the demo, in the words of its settings."""
    rows, train, types = config.data.generator, config.train, ", ".join(config.convert.types)
    alone = f", then the rotation alone for {train.so8t_only_steps}" if train.so8t_only_steps else ""
    return f"""SO8T trains, converts and verifies {config.model.base}: minutes on two cores, no network, no GPU.
  data     {rows.rows if rows else 0} reasoning problems to learn from, {rows.heldout_rows if rows else 0} held out
  train    an SO(8) rotation and a LoRA for {train.steps} steps{alone}
  bake     both folded into ordinary weights
  convert  {types}
  answers  {config.answers.prompts} held-out prompts before and after, through the {config.answers.type} file
  verify   proof that these files are what was trained, and a wrong bake that must be refused
Everything lies in {config.run_dir}; a run that was stopped goes on where it was."""


@app.command(epilog="Example: so8t run configs/demo.yaml train.steps=80 --from train")
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="run this step and all after it again")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STEP", help="stop after this step")] = None,
    force: Annotated[list[str] | None, typer.Option("--force", metavar="STEP", help="run this step again")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the inputs, print the plan, do nothing")] = False,
    quiet: Quiet = False,
) -> None:
    """Run every step that is not up to date."""
    if dry_run:
        _plan(config, overrides, first=first, until=until, force=force)
        return
    _execute(config, overrides, first=first, until=until, force=force, quiet=quiet)


@app.command(epilog="Example: so8t data my.yaml --collect")
def data(
    config: ConfigPath,
    overrides: Overrides = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="first fetch the URLs of data.manifest that robots.txt allows")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Build and check the /think dataset."""
    if collect:
        from pipeline.config import load_config
        from pipeline.data.collect.collect import collect_for
        from pipeline.progress import Reporter

        collect_for(load_config(config, overrides).data, Reporter(quiet=quiet).note)
    _execute(config, overrides, until="data", quiet=quiet)


@app.command(epilog="Example: so8t train configs/demo.yaml train.steps=200")
def train(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train the adapter; resumes.

    Goes on from the last checkpoint; steps before it run if they must.
    """
    _execute(config, overrides, until="train", quiet=quiet)


@app.command(epilog="Example: so8t bake configs/demo.yaml")
def bake(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Fold the adapter into the checkpoint.

    A copy of the original, unquantised one; steps before it run if they must.
    """
    _execute(config, overrides, until="bake", quiet=quiet)


@app.command(epilog="Example: so8t convert configs/demo.yaml 'convert.types=[F16, Q8_0]'")
def convert(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Make the GGUF files.

    Out of the baked checkpoint; steps before it run if they must.
    """
    _execute(config, overrides, until="convert", quiet=quiet)


@app.command(epilog="Example: so8t verify --reference my-model --candidate my-Q8_0.gguf --out out")
def verify(
    reference: Annotated[
        Path | None, typer.Option(metavar="HF_DIR", help="checkpoint the files were made from", show_default=False)
    ] = None,
    candidate: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.gguf", help="file to judge; repeatable", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where the report goes", show_default=False)] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="HF_DIR", help="model before training: adds its own quant damage")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="with --base: adds the legs bake, dtype, controls")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="gate.yaml", help="bounds; default: the built-in policy")
    ] = None,
    corpus: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="text or JSONL to score; repeatable")
    ] = None,
    imatrix: Annotated[Path | None, typer.Option(metavar="FILE", help="importance matrix of the candidates")] = None,
    chunks: Annotated[int, typer.Option(metavar="N", min=2, help="chunks of n_ctx tokens")] = 12,
    n_ctx: Annotated[int, typer.Option(metavar="N", min=64, help="tokens a chunk")] = 512,
    cells: Annotated[str, typer.Option(metavar="LEVEL", help="ways of running: quick or full")] = ("quick"),
    ship_n_ctx: Annotated[
        int | None, typer.Option(metavar="N", min=64, help="context as shipped; default: up to 4096")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="default: all cores")] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="plant known faults; show what the gate sees")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="with --self-test: minutes, on a tiny model")] = False,
    quiet: Quiet = False,
) -> None:
    """Hold GGUF files against their checkpoint."""
    if self_test:
        _self_test(reference, out, quick=quick, quiet=quiet)
    if reference is None or not candidate or out is None:
        lacking = [n for n, v in (("reference", reference), ("candidate", candidate), ("out", out)) if not v]
        raise InputError(f"verify needs --{' and --'.join(lacking)}; or --self-test, which needs none of them")
    _must_exist(reference, *candidate, base, adapter, policy, imatrix, *(corpus or []))
    _quiet_transformers()
    from pipeline.progress import Reporter, StageProgress
    from verification import verify as measure

    level = _level(cells)
    try:
        with StageProgress(Reporter(quiet=quiet)) as progress:
            report = measure(
                reference, candidate, base=base, adapter=adapter, policy=policy, out=out, corpus=corpus or None,
                imatrix=imatrix, chunks=chunks, n_ctx=n_ctx, threads=threads, cells=level, ship_n_ctx=ship_n_ctx,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        written = (out / "report.json").is_file()
        done = f"what was measured is in {out / 'report.html'}" if written else "nothing was measured, so no report"
        raise _Interrupted(done) from None
    _announce(report, out, speaks=distributed.is_first())


def _self_test(reference: Path | None, out: Path | None, *, quick: bool, quiet: bool) -> None:
    """The fault catalogue; 1 when the gate missed a fault at its real-world strength or raised a false alarm."""
    _must_exist(reference)
    _quiet_transformers()
    from pipeline.base_model import self_test_model
    from pipeline.progress import Reporter, StageProgress
    from verification.fault_catalogue.run import self_test as run_self_test

    with StageProgress(Reporter(quiet=quiet)) as progress, self_test_model(reference, quick=quick) as (base, tokenizer):
        result = run_self_test(base=base, tokenizer=tokenizer, quick=quick, out=out, tell=progress)
    console = Console(highlight=False)
    console.print(f"{result.verdict.capitalize()}: {result.summary}.", markup=False)
    for title, entries in (("Missed", result.missed), ("False alarm", result.alarms)):
        for entry in entries:
            console.print(f"{title}: {entry}", markup=False)
    if out is not None:
        console.print(f"Report: {out / 'self_test.html'}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if result.verdict == "pass" else 1)


@app.command(epilog="Example: so8t lint my-model-Q4_K_M.gguf --reference ./my-model")
def lint(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", show_default=False)],
    reference: Annotated[
        Path | None, typer.Option(metavar="HF_DIR", help="checkpoint the file was made from: adds tokens, weights, ...")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="HF_DIR", help="model before training, to name what was not baked")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="adapter in the reference, to name a wrong rotation")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where lint.json goes")] = None,
) -> None:
    """Check a GGUF file without running it, in seconds."""
    _must_exist(file, reference, base, adapter)
    _quiet_transformers()
    from verification.commands.lint import lint as examine
    from verification.commands.lint_terminal import lint_table, write_lint

    report = examine(file, reference=reference, base=base, adapter=adapter)
    console = Console(highlight=False)
    console.print(lint_table(report))
    if out is not None:
        console.print(f"Report: {write_lint(report, out)}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if report.verdict == "pass" else 1)


def _must_exist(*paths: Path | None) -> None:
    """Before anything is loaded: every path that was given is there."""
    for path in paths:
        if path is not None and not path.exists():
            raise InputError(f"{path} does not exist; check the path")


def _level(cells: str) -> Literal["quick", "full"]:
    levels: dict[str, Literal["quick", "full"]] = {"quick": "quick", "full": "full"}
    if cells in levels:
        return levels[cells]
    raise InputError(f"--cells {cells} is unknown; quick or full")


@app.command(epilog="Example: so8t gate runs/demo/report/report.json --policy strict.yaml")
def gate(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", show_default=False)],
    policy: Annotated[
        Path | None, typer.Option(metavar="gate.yaml", help="default: the policy inside the report")
    ] = None,
    policy_sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="refuse a report that was decided under another policy")
    ] = None,
    statement: Annotated[
        bool, typer.Option("--statement/--no-statement", help="the report must match report.intoto.json beside it")
    ] = True,
) -> None:
    """Decide again from a stored report.

    No model is needed; files of the report that are still here must be the ones that were measured.
    """
    from verification import decide, load_policy
    from verification.commands.provenance import changed_artefacts
    from verification.gate.statement import check_policy, check_statement
    from verification.show.write import load_report

    path = report / "report.json" if report.is_dir() else report
    stored = load_report(path)
    if not any(artefact.role == "candidate" for artefact in stored.artefacts):
        raise InputError(f"{path} names no candidate file, so there is nothing to release; verify again")
    if statement:
        check_statement(stored, path)
    if policy_sha256 is not None:
        check_policy(stored, policy_sha256)
    changed, absent = changed_artefacts(stored)
    if changed:
        raise InputError(f"{', '.join(changed)} changed since {report} was written; verify again")
    decided = decide(stored, load_policy(policy) if policy else None)
    if absent:
        words = f"Not here, so not held against their digests: {', '.join(absent)}"
        Console(stderr=True, highlight=False).print(words, markup=False, soft_wrap=True)
    _announce(decided, path.parent)


@app.command("kld-base", epilog="Example: so8t kld-base ./my-model --out my-model.kld")
def kld_base(
    reference: Annotated[Path, typer.Argument(metavar="HF_DIR", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the base file to write", show_default=False)],
    corpus: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="text or JSONL to score; repeatable")
    ] = None,
    chunks: Annotated[int, typer.Option(metavar="N", min=1, help="chunks of n_ctx tokens")] = 12,
    n_ctx: Annotated[int, typer.Option(metavar="N", min=8, help="tokens a chunk")] = 512,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint's logits for llama-perplexity.

    The file is what `llama-perplexity --kl-divergence --kl-divergence-base FILE` and `so8t kld FILE` read.
    """
    _quiet_transformers()
    from pipeline.progress import Reporter, StageProgress
    from verification.logit_parity.llama_cpp_commands import write_base_of

    with StageProgress(Reporter(quiet=quiet)) as progress:
        write_base_of(reference, out, corpus=corpus or None, chunks=chunks, n_ctx=n_ctx, progress=progress)
    Console(highlight=False).print(f"Base file: {out}", markup=False, soft_wrap=True)


@app.command(epilog="Example: so8t kld my-model.kld --candidate my-model-Q4_K_M.gguf")
def kld(
    base: Annotated[Path, typer.Argument(metavar="FILE", help="a base file", show_default=False)],
    candidate: Annotated[Path, typer.Option(metavar="FILE.gguf", show_default=False)],
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="default: all cores")] = None,
    quiet: Quiet = False,
) -> None:
    """Print llama-perplexity's KL statistics.

    A missing, cut or foreign base file is refused here (exit code 2); the stock tool exits 0. To decide, use verify.
    """
    from pipeline.progress import Reporter, StageProgress
    from verification.logit_parity.llama_cpp_commands import candidate_statistics

    with StageProgress(Reporter(quiet=quiet)) as progress:
        result = candidate_statistics(base, candidate, threads=threads, progress=progress)
    print(result.text, end="")


@app.command(epilog="Example: so8t report runs/demo")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    statement: Annotated[
        bool, typer.Option("--statement/--no-statement", help="report.json must match report.intoto.json beside it")
    ] = True,
) -> None:
    """Write the report again from report.json."""
    from verification import decide
    from verification.gate.statement import check_statement
    from verification.show.write import load_report, write_report

    folder = run_dir / "report" if (run_dir / "report").is_dir() else run_dir
    found = load_report(folder / "report.json")
    if statement:  # writing again makes a new statement: an edited report must not get one
        check_statement(found, folder / "report.json")
    stored = decide(found)  # its values count, not what it says of itself
    write_report(stored, folder)
    _announce(stored, folder)


@app.command("config-schema", epilog="Example: so8t config-schema > so8t.schema.json")
def config_schema() -> None:
    """Print the configuration's JSON Schema."""
    from pipeline.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command("report-schema", epilog="Example: so8t report-schema > so8t-report.schema.json")
def report_schema() -> None:
    """Print the report's JSON Schema."""
    from verification.show.write import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command(epilog="Example: so8t doctor")
def doctor() -> None:
    """Say what is installed and what is missing."""
    from rich.table import Table
    from rich.text import Text

    from pipeline.cli.doctor import examine

    table = Table("What", "Found", "Needed by", "To mend it", box=None, pad_edge=False)
    findings = examine()
    for finding in findings:
        table.add_row(*map(Text, (finding.name, finding.found, finding.needed_by, finding.mend)))
    Console(highlight=False).print(table)
    raise typer.Exit(1 if any(finding.mend for finding in findings) else 0)


app.command(epilog="Example: so8t serve --model model-Q8_0.gguf --audit-key-file audit.key")(serve)
app.add_typer(audit_app, name="audit")


if __name__ == "__main__":
    main()
