"""The `so8t` command. Exit codes: 0 passed or done, 1 not to be released, 2 bad input or could not run.

Heavy imports happen inside the verbs, so that `--help` and a mistyped path answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from pipeline.cli import exit_codes
from pipeline.cli.explain import all_explanations, explained
from pipeline.cli.layers_verb import layers
from pipeline.cli.saying import occupy_standard_streams, page, say, spare_standard_error
from pipeline.cli.serve_verbs import audit_app, serve
from pipeline.cli.stale import take_away, take_away_named
from pipeline.cli.stopping import Stopped, StopRequests, is_program
from so8t_core.errors import InputError
from verification.engines import distributed

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from verification.gate.report import Report


def _without_blanks(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip())


class _Dense(TyperCommand):
    """Help without blank lines, for a verb whose options would not fit on a screen of 24 lines."""

    def get_help(self, ctx: Any) -> str:
        """The help's lines that hold text."""
        return _without_blanks(super().get_help(ctx))


class _Verbs(TyperGroup):
    """Help without blank lines and without the section of `--help`, so that all verbs fit on a screen of 24 lines."""

    def get_help(self, ctx: Any) -> str:
        """The help's lines that hold text."""
        return _without_blanks(super().get_help(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Only the verbs, without a heading."""
        names = self.list_commands(ctx)
        rows = [(name, self.commands[name].get_short_help_str(limit=formatter.width)) for name in names]
        with formatter.indentation():
            formatter.write_dl(rows)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """One line under the usage, without a blank one between."""
        with formatter.indentation():
            formatter.write_text(self.help or "")

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Without a blank line before it."""
        with formatter.indentation():
            formatter.write_text(self.epilog or "")


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Verify GGUF files against their checkpoint; train, bake and convert a model.",
    epilog="Exit codes: 0 passed, 1 not to be released, 2 bad input. Example: so8t demo",
)

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="run configuration; see configs/", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. train.steps=100", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="show no progress")]


def main() -> None:
    """Entry point of the `so8t` program."""
    occupy_standard_streams()
    with spare_standard_error(), StopRequests() as requests:
        try:
            requests.listen()
            code = _command(requests)
            requests.raises = False
        except (typer.Abort, KeyboardInterrupt, _Interrupted) as error:
            requests.raises = False  # so that the line below is written whole
            kept = str(error) if isinstance(error, _Interrupted) else "finished steps are kept"
            number = requests.asked[0] if requests.asked else signal.SIGINT
            how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"{how}; {kept}", markup=False)
            code = exit_codes.of_signal(number)
        if is_program(main):
            requests.ignore()
    sys.exit(code)


def _command(requests: StopRequests) -> int | str | None:
    """Run the command line and show its errors; returns the exit code.

    Raises:
        KeyboardInterrupt, _Interrupted: a request to end came, even if its exception was lost.
    """
    _calm()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code: int | str | None = app(standalone_mode=False)  # then `typer.Exit(1)` comes back as a return value
        if code == exit_codes.of_signal(signal.SIGINT):  # ctrl-C inside a verb comes back as one too
            raise Stopped
    except (typer.Abort, _Interrupted):
        raise
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also a panic of Rust code, which is no Exception
        if not requests.asked:  # otherwise the signal, which child processes get too, caused the error
            return _last_words(error)
    if requests.asked:
        raise Stopped
    return code


def _last_words(error: BaseException) -> int:
    """`_explained`; where that fails too (no more open files, no memory), show the bare error."""
    try:
        return _explained(error)
    except Exception:
        sys.stderr.write(f"so8t: {type(error).__name__}: {error}"[:500] + "\n")
        return exit_codes.BAD_INPUT


def _explained(error: BaseException) -> int:
    """Show why a command could not run; returns the exit code."""
    if isinstance(error, InputError):
        return _failed(str(error))
    if isinstance(error, BrokenPipeError):
        return exit_codes.READER_GONE
    if isinstance(error, ModuleNotFoundError):
        what = f"the package {error.name!r} is not installed" if error.name else str(error)  # transformers names none
        return _failed(f"{what}; `so8t doctor` says what is missing and how to get it")
    if isinstance(error, MemoryError):
        return _failed("the memory that this process may use is not enough; free some, or raise its limit (ulimit -v)")
    if isinstance(error, OSError):
        return _failed(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        try:
            take_away_named(sys.argv[1:])
        except InputError as problem:
            return _failed(str(problem))
        what = f"{error.format_message()}{_given(error)}"
        return _failed(f"{what} (so8t --help shows the verbs, so8t VERB --help its options)")
    traceback.print_exception(error)  # a fault of so8t: shown whole, and the code means "could not run"
    return exit_codes.BAD_INPUT


def _given(error: BaseException) -> str:
    """The value of the option that the command line's error is about."""
    names = getattr(getattr(error, "param", None), "opts", ())
    found = [value for name, value in zip(sys.argv, sys.argv[1:], strict=False) if name in names]
    return f", given was {found[-1][:80]!r}" if found else ""


class _Interrupted(Exception):
    """Ctrl-C inside a verb; the message says which part of the work is kept."""


def _failed(message: str) -> int:
    """Show an error in a line or two; returns the exit code."""
    try:
        number = distributed.rank()
    except InputError:  # the launch's variables are wrong, and the message says so
        number = 0
    who = f"so8t (process {number})" if number else "so8t"  # in a launch of several processes each reports its errors
    from verification.show.words import visible

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"{who}: {visible(message)}", markup=False)
    return exit_codes.BAD_INPUT


def _calm() -> None:
    """Keep the messages of other libraries off the screen; their errors are still raised."""
    for stream in (sys.stdout, sys.stderr):  # a console with another encoding shows escapes and ends no run
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the loaders: `Reporter` shows the progress
    # Threads of torch and llama.cpp sleep while they wait for one another. GNU's default is to spin: no faster on idle
    # cores (1.4 s each, two threads, 420 products of 300 x 576 x 1536), and three to four times as slow where other
    # programs use the cores too (19 to 25 s against 6 to 7), as on most CI machines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it lists its missing optional kernels at import
    # peft 0.21.2 reads a name that transformers 5.23 deprecates; TrainingArguments renames some options.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is deprecated and will be removed in v6.*")


def _quiet_transformers() -> None:
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()


def _leave_torch_out() -> None:
    """Let transformers find no torch in this process: its tokenizers do not need torch, whose import takes seconds."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that a module is not there
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # "PyTorch was not found"


def _execute(
    config: Path | str,
    overrides: list[str] | None,
    *,
    first: str | None = None,
    until: str | None = None,
    force: list[str] | None = None,
    quiet: bool = False,
) -> None:
    from pipeline.config import load_config, parse_config

    loaded = parse_config(config, overrides=overrides) if isinstance(config, str) else load_config(config, overrides)
    _quiet_transformers()
    from pipeline.progress import Reporter
    from pipeline.run.steps import Run

    run = Run(loaded, Reporter(quiet=quiet))
    report = run.execute(first=first, until=until, force=tuple(force or ()))
    if report is not None:
        _announce(report, run.report, policy="the run's", speaks=distributed.is_first())


def _plan(
    config: Path, overrides: list[str] | None, *, first: str | None, until: str | None, force: list[str] | None
) -> None:
    """Print the plan; exit code 2 if something would stop the run."""
    from pipeline.config import load_config

    loaded = load_config(config, overrides)
    _quiet_transformers()
    from pipeline.progress import Reporter
    from pipeline.run.plan import make_plan
    from pipeline.run.plan_table import plan_table
    from pipeline.run.steps import Run

    plan = make_plan(Run(loaded, Reporter(quiet=True)), first=first, until=until, force=tuple(force or ()))
    with page() as console:
        console.print(plan_table(plan))
        for line in (plan.basis, *(f"Note: {note}" for note in plan.notes)):
            console.print(line, markup=False)
    if plan.problems:
        raise InputError("\nso8t: ".join(plan.problems))


def _announce(report: Report, folder: Path, *, policy: str, speaks: bool = True) -> None:
    """Print the verdict table, the policy that decided and the report's path; exit by the verdict.

    Args:
        policy: the policy's origin, in words.
        speaks: print; in a launch of several processes only the first process prints, and all exit by the verdict.

    Raises:
        InputError: there is no standard output, so that nobody could read a pass.
        OSError: standard output takes no more.
        typer.Exit: always; 141 where the reader of standard output went away.
    """
    if speaks:
        from verification.show.github import append_step_summary
        from verification.show.terminal import verdict_table

        with page() as console:
            console.print(verdict_table(report))
            console.print(_policy_line(report, policy), markup=False, soft_wrap=True)
            console.print(f"Report: {folder / 'report.html'}", markup=False, soft_wrap=True)
        append_step_summary(report)
    raise typer.Exit(exit_codes.of_verdict(report.verdict))


def _policy_line(report: Report, source: str) -> str:
    """A line on the policy that decided: its digest, and each bound that is weaker than the default's."""
    from verification.gate.policy import load_policy, make_policy, weaker
    from verification.gate.statement import policy_digest
    from verification.show.words import visible

    found = weaker(make_policy(report.policy), load_policy())
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    how = f"weaker than the default: {', '.join(found[:4])}{more}" if found else "nowhere weaker than the default"
    return visible(f"Policy: {source}, sha256 {policy_digest(report.policy)[:12]}, {how}")


@app.command(epilog="Example: so8t demo run_dir=/tmp/so8t train.steps=80")
def demo(overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train, bake, convert, verify a 135M model."""
    text = (Path(__file__).parents[1] / "configs" / "demo.yaml").read_text(encoding="utf-8")
    if not quiet and distributed.is_first():
        from pipeline.config import parse_config

        with page() as console:
            console.print(_what_the_demo_shows(parse_config(text, overrides=overrides)), markup=False)
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
        str | None, typer.Option("--from", metavar="STEP", help="run this step and all later ones again")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STEP", help="stop after this step")] = None,
    force: Annotated[list[str] | None, typer.Option("--force", metavar="STEP", help="run this step again")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the inputs and print the plan, change nothing")
    ] = False,
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
    collect: Annotated[bool, typer.Option("--collect", help="first fetch the permitted URLs of data.manifest")] = False,
    preview: Annotated[
        int, typer.Option("--preview", metavar="N", min=0, help="show N rows by loss mask, and counts; write nothing")
    ] = 0,
    quiet: Quiet = False,
) -> None:
    """Build and check the training rows."""
    if collect:
        from pipeline.config import load_config
        from pipeline.data.collect.collect import collect_for
        from pipeline.progress import Reporter

        collect_for(load_config(config, overrides).data, Reporter(quiet=quiet).note)
    if preview:
        _preview(config, overrides, preview, quiet=quiet)
        return
    _execute(config, overrides, until="data", quiet=quiet)


def _preview(config: Path, overrides: list[str] | None, rows: int, *, quiet: bool) -> None:
    """The first training rows by mask, and the counts."""
    from pipeline.config import load_config

    loaded = load_config(config, overrides)
    _quiet_transformers()
    from pipeline.base_model import base_tokenizer
    from pipeline.data.inputs import expected_rows
    from pipeline.data.preview import counts_table
    from pipeline.data.preview import preview as make_preview
    from pipeline.progress import Reporter

    tokenizer = base_tokenizer(loaded.model.base)
    with Reporter(quiet=quiet).task("data rows", expected_rows(loaded.data)) as advance:
        shown, report = make_preview(loaded, tokenizer, rows, lambda n: advance(n))
    with page() as console:
        for text in shown:
            console.print(text, soft_wrap=True)
        console.print(counts_table(report))
        console.print(
            f"{report.train_rows} rows would be trained on, {report.heldout_rows} held out; nothing was written."
        )


@app.command(epilog="Example: so8t train configs/demo.yaml train.steps=200")
def train(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train the adapter, or continue its training.

    Training starts from its last checkpoint. Earlier steps run first if they are not up to date.
    """
    _execute(config, overrides, until="train", quiet=quiet)


@app.command(epilog="Example: so8t bake configs/demo.yaml")
def bake(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Fold the adapter into the checkpoint.

    The result is a copy of the original, unquantised checkpoint. Earlier steps run first if they are not up to date.
    """
    _execute(config, overrides, until="bake", quiet=quiet)


@app.command(epilog="Example: so8t convert configs/demo.yaml 'convert.types=[F16, Q8_0]'")
def convert(config: ConfigPath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Make the GGUF files.

    They come from the baked checkpoint. Earlier steps run first if they are not up to date.
    """
    _execute(config, overrides, until="convert", quiet=quiet)


@app.command(epilog="Example: so8t choose ./my-model --out choice --max-kld 0.05")
def choose(
    checkpoint: Annotated[Path, typer.Argument(metavar="HF_DIR", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for the report and all files", show_default=False)],
    max_size: Annotated[float | None, typer.Option(metavar="MB", min=0, help="largest file, in 10^6 bytes")] = None,
    max_kld: Annotated[
        float | None, typer.Option(metavar="NATS", min=0, help="largest mean KLD, upper end of its interval")
    ] = None,
    policy: Annotated[Path | None, typer.Option(metavar="gate.yaml", help="policy with a bound for each type")] = None,
    types: Annotated[str | None, typer.Option(metavar="A,B,...", help="types to compare; default: 14")] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="your own text in place of the built-in; repeatable")
    ] = None,
    chunks: Annotated[int, typer.Option(metavar="N", min=2, help="rank on N a domain, prove on 2 N")] = 2,
    n_ctx: Annotated[int, typer.Option(metavar="N", min=64, help="tokens in a chunk")] = 256,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; default: all cores")] = None,
    quiet: Quiet = False,
) -> None:
    """Find the smallest file type that passes.

    Compares file types on five domains of text, then verifies the choice on other text.
    """
    _must_exist(checkpoint, policy)
    corpora = _named(corpus or [])
    _quiet_transformers()
    from rich.table import Table

    from pipeline.choose.choose import Limits
    from pipeline.choose.choose import choose as make_choice
    from pipeline.choose.ladder import TYPES
    from pipeline.choose.page import answer, table, write_choice
    from pipeline.progress import Reporter, StageProgress

    limits = Limits(None if max_size is None else int(max_size * 1e6), max_kld, policy)
    with StageProgress(Reporter(quiet=quiet)) as progress:
        choice = make_choice(
            checkpoint,
            out,
            limits,
            types=types.split(",") if types is not None else TYPES,
            corpora=corpora or None,
            chunks=chunks,
            n_ctx=n_ctx,
            threads=threads,
            tell=progress,
        )
    write_choice(choice, out)
    header, *rows = table(choice)
    shown = Table(*header, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    with page() as console:
        console.print(shown)
        console.print(answer(choice), markup=False, soft_wrap=True)
    raise typer.Exit(exit_codes.of_verdict("pass" if choice.chosen is not None else "fail"))


def _named(corpora: list[str]) -> dict[str, Path]:
    """The domains of `--corpus NAME=FILE`."""
    found = {}
    for text in corpora:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise InputError(f"--corpus {text} has no name; write --corpus NAME=FILE")
        found[name] = Path(path)
    _must_exist(*found.values())
    return found


@app.command(epilog="Example: so8t reference ./my-model --out reference.so8t")
def reference(
    checkpoint: Annotated[Path, typer.Argument(metavar="HF_DIR", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE.so8t", help="the reference file to write", show_default=False)],
    corpus: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="text or JSONL to score and publish; repeatable")
    ] = None,
    chunks: Annotated[int, typer.Option(metavar="N", min=2, help="chunks of text to score")] = 12,
    n_ctx: Annotated[int, typer.Option(metavar="N", min=64, help="tokens in a chunk")] = 512,
    cells: Annotated[str, typer.Option(metavar="LEVEL", help="ways of running: quick or full")] = "quick",
    ship_n_ctx: Annotated[
        int | None, typer.Option(metavar="N", min=64, help="context that you ship; default: up to 4096")
    ] = None,
    long_context: Annotated[
        int | None, typer.Option(metavar="N", min=1025, help="one more passage, of N tokens; full: 8192")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; default: all cores")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint's reference file.

    With these few megabytes anybody can repeat the verdict on a downloaded GGUF without the weights:
    `so8t verify --reference FILE.so8t`. The file contains the tokens of the scored text.
    """
    _must_exist(checkpoint, *(corpus or []))
    _quiet_transformers()
    from pipeline.progress import Reporter, StageProgress
    from verification.commands.provenance import versions
    from verification.reference_file.make import write_reference

    level = _level(cells)
    with StageProgress(Reporter(quiet=quiet)) as progress:
        write_reference(
            checkpoint,
            out,
            corpus=corpus or None,
            chunks=chunks,
            n_ctx=n_ctx,
            level=level,
            ship_n_ctx=ship_n_ctx,
            long_context=long_context,
            threads=threads,
            versions=versions(),
            tell=progress,
        )
    say(f"Reference file: {out}, {out.stat().st_size / 1e6:.1f} MB\n")


@app.command(cls=_Dense, epilog="Example: so8t verify --reference my-model --candidate my-Q8_0.gguf --out out")
def verify(
    reference: Annotated[
        Path | None,
        typer.Option(metavar="HF_DIR", help="checkpoint, its Hub id, or reference.so8t", show_default=False),
    ] = None,
    candidate: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.gguf", help="file, folder or OWNER/NAME:TYPE; repeatable", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write the report into this folder", show_default=False)
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="HF_DIR", help="the model before training: adds the leg controls"),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="the trained adapter: adds the legs bake and dtype")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="gate.yaml", help="bounds; default: the built-in policy")
    ] = None,
    corpus: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="text or JSONL to score; repeatable")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="importance matrix that the files were made with")
    ] = None,
    chunks: Annotated[int, typer.Option(metavar="N", min=2, help="chunks of text to score")] = 12,
    n_ctx: Annotated[int, typer.Option(metavar="N", min=64, help="tokens in a chunk")] = 512,
    cells: Annotated[str, typer.Option(metavar="LEVEL", help="ways of running: quick or full")] = ("quick"),
    ship_n_ctx: Annotated[
        int | None,
        typer.Option(metavar="N", min=64, help="context that you ship; default: up to 4096"),
    ] = None,
    long_context: Annotated[
        int | None, typer.Option(metavar="N", min=1025, help="one more passage, of N tokens; full: 8192")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="hold one layer of the reference, or all"),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; default: all cores")] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="plant known faults, show which ones are found")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="--self-test on a tiny model, in minutes")] = False,
    quiet: Quiet = False,
) -> None:
    """Compare GGUF files with their checkpoint."""
    take_away("verify", out)
    if self_test:
        _self_test(reference, out, quick=quick, quiet=quiet)
    if reference is None or not candidate or out is None:
        lacking = [n for n, v in (("reference", reference), ("candidate", candidate), ("out", out)) if not v]
        raise InputError(f"verify needs --{' and --'.join(lacking)}; or --self-test, which needs none of them")
    _quiet_transformers()
    from pipeline import hub

    reference, base = hub.checkpoint(reference), base and hub.checkpoint(base)
    candidate = [hub.gguf_file(path) for path in candidate]
    _must_exist(reference, *candidate, base, adapter, policy, imatrix, *(corpus or []))
    from pipeline.progress import Reporter, StageProgress
    from verification import verify as measure

    level = _level(cells)
    try:
        with StageProgress(Reporter(quiet=quiet)) as progress:
            report = measure(
                reference,
                candidate,
                base=base,
                adapter=adapter,
                policy=policy,
                out=out,
                corpus=corpus or None,
                imatrix=imatrix,
                chunks=chunks,
                n_ctx=n_ctx,
                threads=threads,
                stream=stream,
                cells=level,
                ship_n_ctx=ship_n_ctx,
                long_context=long_context,
                progress=progress,
            )
    except KeyboardInterrupt:
        written = (out / "report.json").is_file()
        done = f"what was measured is in {out / 'report.html'}" if written else "nothing was measured, so no report"
        raise _Interrupted(done) from None
    _announce(report, out, policy=str(policy or "the default"), speaks=distributed.is_first())


def _self_test(reference: Path | None, out: Path | None, *, quick: bool, quiet: bool) -> None:
    """Run the fault catalogue; exit code 1 when the gate missed a fault at its real-world strength or raised a false
    alarm."""
    _must_exist(reference)
    _quiet_transformers()
    from pipeline.base_model import self_test_model
    from pipeline.progress import Reporter, StageProgress
    from verification.fault_catalogue.run import self_test as run_self_test

    with StageProgress(Reporter(quiet=quiet)) as progress, self_test_model(reference, quick=quick) as (base, tokenizer):
        result = run_self_test(base=base, tokenizer=tokenizer, quick=quick, out=out, tell=progress)
    with page() as console:
        console.print(f"{result.verdict.capitalize()}: {result.summary}.", markup=False)
        for title, entries in (("Missed", result.missed), ("False alarm", result.alarms)):
            for entry in entries:
                console.print(f"{title}: {entry}", markup=False)
        if out is not None:
            console.print(f"Report: {out / 'self_test.html'}", markup=False, soft_wrap=True)
    raise typer.Exit(exit_codes.of_verdict(result.verdict))


@app.command(epilog="Example: so8t lint my-model-Q4_K_M.gguf --reference ./my-model")
def lint(
    file: Annotated[Path | None, typer.Argument(metavar="FILE.gguf", show_default=False)] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="HF_DIR", help="checkpoint that the file was made from: also checks tokens and weights"),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="HF_DIR", help="the model before training: names unbaked tensors")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="the baked adapter: names wrong rotations")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write lint.json into this folder")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="explain each note and finding; without a file: explain all checks")
    ] = False,
) -> None:
    """Check a GGUF file without running it, in seconds."""
    take_away("lint", out)
    if file is None:
        if not explain:
            raise InputError("lint needs a FILE.gguf; or --explain alone, which lists what each check means")
        with page() as console:
            console.print(all_explanations())
        return
    if adapter is None and is_program(main):
        _leave_torch_out()
    _quiet_transformers()
    from pipeline import hub

    file, reference, base = hub.gguf_file(file), reference and hub.checkpoint(reference), base and hub.checkpoint(base)
    _must_exist(file, reference, base, adapter)
    from verification.commands.lint import lint as examine
    from verification.commands.lint_terminal import lint_table, write_lint

    report = examine(file, reference=reference, base=base, adapter=adapter)
    with page() as console:
        console.print(lint_table(report))
        if explain:
            console.print(explained(report))
        if out is not None:
            console.print(f"Report: {write_lint(report, out)}", markup=False, soft_wrap=True)
    raise typer.Exit(exit_codes.of_verdict(report.verdict))


def _must_exist(*paths: Path | None) -> None:
    """Refuse a path that does not exist, before anything is loaded."""
    for path in paths:
        if path is not None and not path.exists():
            raise InputError(f"{path} does not exist; check the path")


def _level(cells: str) -> Literal["quick", "full"]:
    levels: dict[str, Literal["quick", "full"]] = {"quick": "quick", "full": "full"}
    if cells in levels:
        return levels[cells]
    raise InputError(f"--cells {cells} is unknown; choose quick or full")


@app.command(epilog="Example: so8t gate runs/demo/report/report.json --policy strict.yaml")
def gate(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", show_default=False)],
    policy: Annotated[
        Path | None, typer.Option(metavar="gate.yaml", help="bounds; default: the policy inside the report")
    ] = None,
    policy_sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="refuse a report that was decided with another policy")
    ] = None,
    statement: Annotated[
        bool, typer.Option("--statement/--no-statement", help="the report must match report.intoto.json beside it")
    ] = True,
) -> None:
    """Decide again from a stored report.

    Needs no model. A file that the report names must not have changed, if it is on this machine.
    """
    from verification import decide, load_policy
    from verification.gate.statement import check_policy

    path = report / "report.json" if report.is_dir() else report
    rules = load_policy(policy) if policy else None
    stored = _stored(path, statement=statement)
    if policy_sha256 is not None:
        check_policy(stored, policy_sha256)
    decided = decide(stored, rules)
    _announce(decided, path.parent, policy=str(policy or "the report's own"))


def _stored(path: Path, *, statement: bool) -> Report:
    """A stored report to decide again; those of its measured files that are on this machine must be unchanged.

    Raises:
        InputError: the report cannot be read, names no candidate or differs from its statement, or a file changed.
    """
    from verification.commands.provenance import changed_artefacts
    from verification.gate.statement import check_statement
    from verification.gate.stored import require_candidate
    from verification.show.words import visible
    from verification.show.write import load_report

    stored = load_report(path)
    require_candidate(stored, path)
    if statement:
        check_statement(stored, path)
    changed, absent = changed_artefacts(stored.artefacts)
    if changed:
        raise InputError(f"{_few(changed)} changed since {path} was written; verify again")
    if absent:
        words = visible(f"Not here, so not held against their digests: {_few(absent)}")
        Console(stderr=True, highlight=False).print(words, markup=False, soft_wrap=True)
    return stored


def _few(paths: list[str]) -> str:
    """The first paths of a list for a message, each shortened and in one line."""
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return ", ".join(" ".join(path.split())[:200] for path in paths[:8]) + more


@app.command("kld-base", epilog="Example: so8t kld-base ./my-model --out my-model.kld")
def kld_base(
    reference: Annotated[Path, typer.Argument(metavar="HF_DIR", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the base file to write", show_default=False)],
    corpus: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="text or JSONL to score; repeatable")
    ] = None,
    chunks: Annotated[int, typer.Option(metavar="N", min=1, help="chunks of text to score")] = 12,
    n_ctx: Annotated[int, typer.Option(metavar="N", min=8, help="tokens in a chunk")] = 512,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint's logits for llama-perplexity.

    `llama-perplexity --kl-divergence --kl-divergence-base FILE` and `so8t kld FILE` read this file.
    """
    _quiet_transformers()
    from pipeline.progress import Reporter, StageProgress
    from verification.logit_parity.llama_cpp_commands import write_base_of

    with StageProgress(Reporter(quiet=quiet)) as progress:
        write_base_of(reference, out, corpus=corpus or None, chunks=chunks, n_ctx=n_ctx, progress=progress)
    say(f"Base file: {out}\n")


@app.command(epilog="Example: so8t kld my-model.kld --candidate my-model-Q4_K_M.gguf")
def kld(
    base: Annotated[Path, typer.Argument(metavar="FILE", help="a base file", show_default=False)],
    candidate: Annotated[Path, typer.Option(metavar="FILE.gguf", help="file to measure", show_default=False)],
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; default: all cores")] = None,
    quiet: Quiet = False,
) -> None:
    """Print the KL statistics of llama-perplexity.

    Refuses a base file that is missing, cut or of another kind, with exit code 2; llama-perplexity exits with 0. This
    command gives no verdict: use verify for that.
    """
    from pipeline.progress import Reporter, StageProgress
    from verification.logit_parity.llama_cpp_commands import candidate_statistics

    with StageProgress(Reporter(quiet=quiet)) as progress:
        result = candidate_statistics(base, candidate, threads=threads, progress=progress)
    say(result.text)


@app.command(epilog="Example: so8t report runs/demo")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    statement: Annotated[
        bool, typer.Option("--statement/--no-statement", help="report.json must match report.intoto.json beside it")
    ] = True,
) -> None:
    """Write the report again from report.json."""
    from verification import decide
    from verification.show.write import write_report

    folder = run_dir / "report" if (run_dir / "report").is_dir() else run_dir
    # Writing makes a statement, which an edited report must not get; its values decide, not its stored verdict.
    stored = decide(_stored(folder / "report.json", statement=statement))
    write_report(stored, folder)
    _announce(stored, folder, policy="the report's own")


@app.command(epilog="Example: so8t release runs/demo --to my-name/my-model-GGUF")
def release(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    to: Annotated[
        str | None, typer.Option("--to", metavar="OWNER/NAME", help="upload to this repository of the Hub")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="gate.yaml", help="bounds; default: the policy inside the report")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
) -> None:
    """Publish a run's files that passed the gate.

    Writes the verified files, the report, VERIFICATION.md and a badge into RUN_DIR/release; --to uploads that folder.
    Writes and uploads nothing unless the gate passes.
    """
    from pipeline import hub
    from pipeline.release.publish import local_paths, make_release
    from verification import decide, load_policy

    if to is not None:
        hub.check_repository(to)
    folder = run_dir / "report" if (run_dir / "report").is_dir() else run_dir
    report = decide(_stored(folder / "report.json", statement=True), load_policy(policy) if policy else None)
    if report.verdict != "pass":
        _announce(report, folder, policy=str(policy or "the report's own"))
    digests = make_release(report, folder, run_dir / "release")
    said = [f"Release: {run_dir / 'release'}, {len(digests)} verified files", *local_paths(report)]
    if to is not None:
        message = f"Files verified by SO8T: {report.summary}"[:200]
        said.append(
            f"Uploaded: {hub.upload(run_dir / 'release', to, digests=digests, private=private, message=message)}"
        )
    say("\n".join(said) + "\n")
    raise typer.Exit(exit_codes.of_verdict(report.verdict))


@app.command("config-schema", epilog="Example: so8t config-schema > so8t.schema.json")
def config_schema() -> None:
    """Print the configuration's JSON Schema."""
    from pipeline.config import RunConfig

    say(json.dumps(RunConfig.model_json_schema(), indent=2) + "\n")


@app.command("report-schema", epilog="Example: so8t report-schema > so8t-report.schema.json")
def report_schema() -> None:
    """Print the report's JSON Schema."""
    from verification.show.write import json_schema

    say(json.dumps(json_schema(), indent=2) + "\n")


@app.command(epilog="Example: so8t doctor")
def doctor() -> None:
    """List what is installed and what is missing."""
    from rich.table import Table
    from rich.text import Text

    from pipeline.cli.doctor import examine

    table = Table("What", "Found", "Needed by", "To mend it", box=None, pad_edge=False)
    findings = examine()
    for finding in findings:
        table.add_row(*map(Text, (finding.name, finding.found, finding.needed_by, finding.mend)))
    with page() as console:
        console.print(table)
    raise typer.Exit(1 if any(finding.mend for finding in findings) else 0)


app.command(epilog="Example: so8t layers path/to/model --rows chats.jsonl --plot layers.svg")(layers)
app.command(epilog="Example: so8t serve --model model-Q8_0.gguf --audit-key-file audit.key")(serve)
app.add_typer(audit_app, name="audit")


if __name__ == "__main__":
    main()
