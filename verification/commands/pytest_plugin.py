"""`pytest --so8t-reference DIR --so8t-candidate F.gguf`: one test for each leg and check of a verification.

The verification is measured once, when tests are collected; each check becomes a test `so8t::<leg>::<check>[<file>]`,
and `so8t::verdict` fails unless the verdict is "pass". The test of a failed or inconclusive check fails. The test of a
check that was waived or not evaluated is skipped with a reason. Tests have the marker `so8t`. A session never ends with
exit code 0 where the verdict did not pass or its test did not run (`-k`, `--deselect`, `--collect-only`, a call of
`pytest.exit`). Without the options this module does nothing and imports nothing heavy: pytest loads it at every start.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from verification.gate.report import Check, Report


_PASSED = pytest.StashKey[bool]()  # the test of the verdict ran, and the verdict was "pass"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; they have the names and defaults of `so8t verify`."""
    group = parser.getgroup("so8t", "GGUF files against their Hugging Face checkpoint")
    add = group.addoption
    add("--so8t-reference", metavar="DIR", help="checkpoint the files were made from")
    add("--so8t-candidate", metavar="FILE.gguf", action="append", default=[], help="file to judge; repeatable")
    add("--so8t-base", metavar="DIR", help="model before training")
    add("--so8t-adapter", metavar="DIR", help="with --so8t-base: adds the legs bake, dtype, controls")
    add("--so8t-policy", metavar="gate.yaml", help="bounds; default: the built-in policy")
    add("--so8t-corpus", metavar="FILE", action="append", default=[], help="text or JSONL to score; repeatable")
    add("--so8t-imatrix", metavar="FILE", help="importance matrix the candidates were quantised with")
    add("--so8t-chunks", metavar="N", type=int, default=12, help="chunks of n_ctx tokens")
    add("--so8t-n-ctx", metavar="N", type=int, default=512, help="tokens a chunk")
    add("--so8t-cells", choices=("quick", "full"), default="quick", help="ways of running each file; full adds lengths")
    add("--so8t-ship-n-ctx", metavar="N", type=int, help="context as shipped; default: up to 4096")
    add("--so8t-threads", metavar="N", type=int, help="default: all cores")
    add("--so8t-out", metavar="DIR", help="where the report goes; default: nowhere")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; refuse a reference without a candidate, and a candidate without a reference.

    Raises:
        pytest.UsageError: only one of reference and candidate is given, or several pytest workers would each measure.
    """
    config.addinivalue_line("markers", "so8t: one check of a GGUF verification (so8t)")
    if bool(config.getoption("so8t_reference")) != bool(config.getoption("so8t_candidate")):
        raise pytest.UsageError("--so8t-reference and --so8t-candidate belong together; give both or neither")
    several = config.getoption("numprocesses", None) or config.getoption("dist", "no") != "no"
    if _asked(config) and (hasattr(config, "workerinput") or several):
        raise pytest.UsageError("the so8t checks are measured in one process: run them without -n and --dist")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Delete an earlier report before anything, for example an import error in a test, can stop this run.

    Raises:
        pytest.UsageError: the directory of --so8t-out cannot be written.
    """
    out = session.config.getoption("so8t_out")
    if _asked(session.config) and out:
        from so8t_core.errors import InputError
        from verification.gate.stored import clear_report

        try:
            clear_report(Path(out))
        except InputError as error:
            raise pytest.UsageError(f"so8t: {error}") from None


@pytest.hookimpl(tryfirst=True)  # before -k and -m pick among the tests
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Measure, and add the checks to the other collected tests."""
    if _asked(config):
        items.extend(_items(session, _measure(config)))


@pytest.hookimpl(trylast=True)  # after all other hooks that set the exit code
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Exit with 0 only where the test of the verdict ran and passed."""
    if _asked(session.config) and session.exitstatus == 0 and not session.config.stash.get(_PASSED, False):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print why a session without a passed verdict does not end with 0."""
    if _asked(config) and not config.stash.get(_PASSED, False):
        terminalreporter.write_line("so8t: no passed verdict in this session, so it does not end with 0", red=True)


def _asked(config: pytest.Config) -> bool:
    return bool(config.getoption("so8t_reference"))


def _measure(config: pytest.Config) -> Report:
    option = config.getoption
    for path in (option("so8t_reference"), *option("so8t_candidate"), *option("so8t_corpus")):
        if not Path(path).exists():
            raise pytest.UsageError(f"so8t: {path} does not exist; check the path")
    from so8t_core.errors import InputError
    from verification import verify
    from verification.show.github import append_step_summary

    try:
        report = verify(
            option("so8t_reference"),
            option("so8t_candidate"),
            base=option("so8t_base"),
            adapter=option("so8t_adapter"),
            policy=option("so8t_policy"),
            corpus=option("so8t_corpus") or None,
            imatrix=option("so8t_imatrix"),
            chunks=option("so8t_chunks"),
            n_ctx=option("so8t_n_ctx"),
            threads=option("so8t_threads"),
            out=option("so8t_out"),
            cells=option("so8t_cells"),
            ship_n_ctx=option("so8t_ship_n_ctx"),
        )
    except InputError as error:
        raise pytest.UsageError(f"so8t: {error}") from None

    def summary() -> None:
        append_step_summary(report)

    config.add_cleanup(summary)  # runs after pytest has printed the verdict
    return report


def _items(session: pytest.Session, report: Report) -> Iterable[pytest.Item]:
    root = _Suite.from_parent(session, name="so8t", nodeid="so8t")
    for leg in report.legs:
        suite = _Suite.from_parent(root, name=leg.name, nodeid=f"so8t::{leg.name}")
        for check in leg.checks:
            name = check.name.removeprefix(f"{leg.name}.") + (f"[{check.subject}]" if check.subject else "")
            yield CheckItem.from_parent(suite, name=name, check=check)
    yield VerdictItem.from_parent(root, name="verdict", report=report)


class _Suite(pytest.Collector):
    """One leg of the report; its tests are made from the report, not found in a file."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        return ()


class NotReleased(Exception):
    """A failed check; pytest shows its message without a traceback."""


class CheckItem(pytest.Item):
    """One check of the report."""

    def __init__(self, *, check: Check, **more: Any) -> None:
        super().__init__(**more)
        self.check = check
        self.add_marker("so8t")

    def runtest(self) -> None:
        if self.check.status == "waived":
            pytest.skip(f"waived: {self.check.reason}")
        if self.check.status == "not evaluated":
            pytest.skip(f"not evaluated: {self.check.detail or 'nothing was given to measure it with'}")
        if self.check.status != "pass":
            raise NotReleased(_sentence(self.check))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, NotReleased) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f"{self.check.name} {self.check.subject}".rstrip()


class VerdictItem(pytest.Item):
    """The decision over all legs."""

    def __init__(self, *, report: Report, **more: Any) -> None:
        super().__init__(**more)
        self.report = report
        self.add_marker("so8t")

    def runtest(self) -> None:
        if self.report.verdict != "pass":
            raise NotReleased(f"{self.report.verdict}: {self.report.summary}")
        self.config.stash[_PASSED] = True

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, NotReleased) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, "so8t verdict"


def _sentence(check: Check) -> str:
    from verification.show.words import texts

    value, bound = texts(check)
    subject = f" ({check.subject})" if check.subject else ""
    detail = f"\n{check.detail}" if check.detail else ""
    return f"{check.status}: {check.title}{subject}: {value}" + (f", bound {bound}" if bound else "") + detail
