"""Laws of the command line: a user's mistake gives a line that names the value and the way out, and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made import Made
from remembered_converter import in_use
from test_run import TEXT  # the tiny run's settings

from pipeline.cli import main as cli

# For texts of some 100 positions through a random model.
LOOSE = "evidence: {positions: 100, chunks: 2}\nconvert: {top1: 0.9}\ncells: {F16: {mean_kld: 1, top1: 0}}\n"


def so8t(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str, str]:
    """Run the command in this process; (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["so8t", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\nmodel: {{base: {tiny_dir}}}\n{TEXT}", encoding="utf-8")
    return path


def _bad_jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{oops\n', encoding="utf-8")
    return path


def _latin(tmp_path: Path) -> Path:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    return path


def _empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.jsonl"
    path.touch()
    return path


SOURCES = {"bad": _bad_jsonl, "latin": _latin, "empty": _empty}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], ["nowhere.yaml does not exist", "configs/demo.yaml"]),
        (["run", "{config}", "train.stepz=3"], ["train.stepz", "unknown key"]),
        (["run", "{config}", "train.steps=many"], ["train.steps", "many"]),
        (["run", "{config}", "--until", "cook"], ["cook", "train"]),
        (["run", "{config}", "--surprise"], ["--surprise", "--help"]),
        (["data", "{config}", "data.sources=[gone.jsonl]"], ["gone.jsonl"]),
        (["data", "{config}", "data.sources=[{bad}]"], ["bad.jsonl", "2"]),
        (["data", "{config}", "data.sources=[{latin}]"], ["latin.jsonl", "UTF-8"]),
        (["data", "{config}", "data.sources=[{empty}]", "data.generator=null"], ["no training rows", "0 read"]),
        (["train", "{config}", "train.layers=[7]"], ["layer 7", "2 layers"]),
        (["train", "{config}", "train.lora={{targets: [qkv_proj]}}"], ["qkv_proj", "matches no"]),
        (["convert", "{config}", "convert.types=[Q9_9]"], ["Q9_9", "Q8_0"]),
        (["run", "{config}", "model.base=./no-such-model"], ["no-such-model"]),
        (["verify", "--reference", "gone", "--candidate", "x.gguf", "--out", "o"], ["gone does not exist"]),
        (["verify", "--out", "o"], ["--reference and --candidate", "--self-test"]),
        (["verify", "--self-test", "--reference", "gone"], ["gone does not exist"]),
        (["gate", "gone.json"], ["gone.json"]),
        (["report", "gone"], ["gone"]),
        (["cook"], ["cook"]),
    ],
)
def test_mistake_gets_one_clear_line_and_exit_2(
    arguments: list[str], words: list[str], config: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {name: make(tmp_path) for name, make in SOURCES.items() if any(f"{{{name}}}" in a for a in arguments)}
    code, _, err = so8t(capfd, monkeypatch, *(a.format(config=config, **made) for a in arguments))
    said = [line for line in err.splitlines() if line.startswith("so8t: ")]
    assert code == 2, err
    assert len(said) == 1, err
    assert "Traceback" not in err
    assert all(word in err for word in words), err


def test_width_that_is_no_multiple_of_8_names_the_layer(
    config: Path, tmp_path: Path, tiny_dir: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    from transformers import LlamaConfig, LlamaForCausalLM

    odd = tmp_path / "odd"
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=36,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=12,
            vocab_size=49152,
            pad_token_id=2,
        )
    ).save_pretrained(odd)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_dir / name, odd / name)
    code, _, err = so8t(capfd, monkeypatch, "train", config, f"model.base={odd}", "--quiet")
    assert code == 2
    assert "o_proj" in err
    assert "36" in err
    assert "multiple of 8" in err


@pytest.fixture(scope="session")
def candidate(made: Made, tiny_dir: Path, remembered_converter: Path) -> Path:
    return made(_candidate, tiny_dir, remembered_converter) / "tiny-F16.gguf"


def _candidate(folder: Path, checkpoint: Path, converter: Path) -> None:
    from verification.engines.convert import convert

    with in_use(converter):
        convert(checkpoint, folder / "tiny-F16.gguf", outtype="f16")


def test_truncated_gguf_is_refused(
    tiny_dir: Path, candidate: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(candidate.read_bytes()[:-1000])
    code, _, err = so8t(
        capfd, monkeypatch, "verify", "--reference", tiny_dir, "--candidate", cut, "--out", tmp_path / "o", "-q"
    )
    assert code == 2
    assert "cut.gguf" in err
    assert list((tmp_path / "o").iterdir()) == []  # no report: nothing was decided


def test_vocabulary_mismatch_is_refused(
    tiny_dir: Path, candidate: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    other = Path(shutil.copytree(tiny_dir, tmp_path / "other"))
    fields = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**fields, "vocab_size": 49000}), encoding="utf-8")
    code, _, err = so8t(
        capfd, monkeypatch, "verify", "--reference", other, "--candidate", candidate, "--out", tmp_path / "o", "-q"
    )
    assert code == 2
    assert "49152" in err
    assert "49000" in err


class Verified(NamedTuple):
    """A candidate of its own and the report of its verification, by the command."""

    candidate: Path
    report: Path
    out: str


@pytest.fixture(scope="session")
def verified_once(
    tiny_dir: Path, candidate: Path, remembered_converter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Verified:
    folder = tmp_path_factory.mktemp("verified")
    mine = folder / "mine.gguf"
    shutil.copyfile(candidate, mine)
    (folder / "loose.yaml").write_text(LOOSE)
    command = ["verify", "--reference", tiny_dir, "--candidate", mine, "--out", folder / "o", "--chunks", 2]
    command += ["--n-ctx", 128, "--cells", "quick", "--ship-n-ctx", 256, "--policy", folder / "loose.yaml", "-q"]
    words = [sys.executable, "-m", "pipeline.cli.main", *map(str, command)]
    with in_use(remembered_converter):
        done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return Verified(mine, folder / "o" / "report.json", done.stdout)


@pytest.fixture
def verified(verified_once: Verified) -> Iterator[Verified]:
    """The same for each test, whatever the one before did to it."""
    files = {path: path.read_bytes() for path in [verified_once.candidate, *verified_once.report.parent.iterdir()]}
    yield verified_once
    for path, data in files.items():
        path.write_bytes(data)


def test_verify_passes_a_healthy_file_and_gate_decides_again(
    verified: Verified, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Pass" in verified.out
    report = verified.report
    assert so8t(capfd, monkeypatch, "gate", report)[0] == 0
    default = tmp_path / "default.yaml"
    default.write_text("{}\n", encoding="utf-8")
    code, out, _ = so8t(capfd, monkeypatch, "gate", report, "--policy", default)  # 126 positions prove little
    assert code == 1
    assert "Inconclusive" in out
    strict = tmp_path / "strict.yaml"
    strict.write_text("convert: {mean_kld: 1.0e-12}\n", encoding="utf-8")
    assert so8t(capfd, monkeypatch, "gate", report, "--policy", strict)[0] == 1
    strict.write_text("convert: {mean_kdl: 1}\n", encoding="utf-8")
    code, _, err = so8t(capfd, monkeypatch, "gate", report, "--policy", strict)
    assert code == 2
    assert "mean_kdl" in err


def test_help_answers_without_loading_torch() -> None:
    code = (
        "import sys; sys.argv = ['so8t', '--help']\nfrom pipeline.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def helps(command: Any, path: str) -> Iterator[tuple[str, str]]:
    """(verb, its help on 80 columns) of a command and all below it."""
    yield path, command.get_help(command.make_context(path, [], resilient_parsing=True))
    for name, below in getattr(command, "commands", {}).items():
        yield from helps(below, f"{path} {name}")


def test_every_verb_has_an_example_and_fits_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, 24 lines; `serve`, with its twenty-two options, takes 34."""
    import typer

    monkeypatch.setenv("COLUMNS", "80")
    found = dict(helps(typer.main.get_command(cli.app), "so8t"))
    assert len(found) > 15
    for verb, text in found.items():
        assert "Example: so8t" in " ".join(text.split()), verb
        assert len(text.splitlines()) <= (34 if verb == "so8t serve" else 24), (verb, text)
        assert max(map(len, text.splitlines())) <= 80, verb
        example = " ".join(text.split("Example: ")[1].split())
        assert example.startswith(verb) or verb == "so8t", f"{verb}: {example}"


def test_config_schema_is_json(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = so8t(capfd, monkeypatch, "config-schema")
    assert code == 0
    assert json.loads(out)["additionalProperties"] is False


def test_report_schema_is_the_models(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verification.gate.report import SCHEMA_VERSION, Report

    code, out, _ = so8t(capfd, monkeypatch, "report-schema")
    schema = json.loads(out)
    assert code == 0
    assert SCHEMA_VERSION in schema["title"]
    assert set(schema["properties"]) == set(Report.model_fields)


def test_an_unknown_level_of_cells_is_named(
    tiny_dir: Path, candidate: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = so8t(
        capfd,
        monkeypatch,
        "verify",
        "--reference",
        tiny_dir,
        "--candidate",
        candidate,
        "--out",
        tmp_path / "o",
        "--cells",
        "some",
    )
    assert (code, "some is unknown; choose quick or full" in err) == (2, True)


def test_doctor_finds_everything_here(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = so8t(capfd, monkeypatch, "doctor")
    assert code == 0, out
    assert "llama-cpp-python" in out


def test_doctor_knows_every_dependency() -> None:
    import tomllib

    from pipeline.cli.doctor import _PACKAGES

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for extra in ("data", "demo", "quant", "serve") for r in extras[extra])]
    names = {re.split(r"[><=!\[;]", requirement)[0].strip() for requirement in wanted} - {"so8t"}
    assert names == {name for name, _, _ in _PACKAGES}


def test_doctor_names_each_missing_package_its_verbs_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from pipeline.cli.doctor import _PACKAGES, examine

    version = importlib.metadata.version
    for hidden, verbs, mend in _PACKAGES:

        def without(name: str, hidden: str = hidden) -> str:
            if name == hidden:
                raise importlib.metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(importlib.metadata, "version", without)
        rows = [finding for finding in examine() if finding.found == "missing"]
        assert (hidden, verbs, mend) in [(row.name, row.needed_by, row.mend) for row in rows]
        assert {row.name for row in rows} == {hidden}
        assert mend.startswith("pip install ")


def test_doctor_works_where_nothing_else_does(tmp_path: Path) -> None:
    """An interpreter that has typer, rich and what they need, and nothing more: a table and exit code 1."""
    import sysconfig

    needed = "typer rich click markdown_it mdurl pygments shellingham typing_ annotated pydantic"
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name.lower().startswith(tuple(needed.split())):
            (tmp_path / entry.name).symlink_to(entry)
    root = Path(__file__).parents[3]
    start = f"import sys; sys.path += [{str(root)!r}, {str(tmp_path)!r}]; sys.argv = ['so8t', 'doctor']\n"
    command = [sys.executable, "-I", "-S", "-c", start + "from pipeline.cli.main import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "200"})
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1
    assert done.stdout.count("missing") > 15
    assert "pip install 'so8t[serve]'" in done.stdout


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("answers.type=Q5_0", ["answers.type = 'Q5_0'", "convert.types"]),
        ("convert.types=[Q8_0, Q9]", ["'Q9'", "known: F32"]),
        ("verify.policy=nope.yaml", ["nope.yaml", "does not exist"]),
        ("verify.policy={bake: {max_abs: 1}}", ["verify.policy", "bake.max_abs", "unknown key"]),
        ("verify.corpus=nope.txt", ["verify.corpus", "nope.txt"]),
    ],
)
def test_what_only_the_last_steps_read_is_checked_before_the_first(
    override: str, words: list[str], config: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = so8t(capfd, monkeypatch, "run", config, override, "-q")
    assert code == 2
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


def test_a_fault_of_the_program_is_never_a_verdict(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("pipeline.cli.doctor.examine", broken)
    code, _, err = so8t(capfd, monkeypatch, "doctor")
    assert code == 2
    assert "Traceback" in err


def test_ctrl_c_says_that_finished_steps_are_kept(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.cli.doctor.examine", stopped)
    code, _, err = so8t(capfd, monkeypatch, "doctor")
    assert code == 130
    assert "finished steps are kept" in err


@pytest.mark.parametrize(
    ("where", "words", "left"),
    [("carry_out", "what was measured is in {out}/report.html", True), ("artefacts", "nothing was measured", False)],
)
def test_ctrl_c_says_where_the_report_of_what_was_measured_lies(
    where: str,
    words: str,
    left: bool,
    tiny_dir: Path,
    tiny_gguf: Path,
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"verification.commands.verify.{where}", stopped)
    arguments = ("verify", "--reference", tiny_dir, "--candidate", tiny_gguf, "--out", tmp_path / "o", "-q")
    code, _, err = so8t(capfd, monkeypatch, *arguments)
    assert code == 130
    assert words.format(out=tmp_path / "o") in err
    assert (tmp_path / "o" / "report.json").exists() == left


def test_report_decides_by_values_not_by_what_the_file_says_of_itself(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verification.gate.check import plain_check, zero_check
    from verification.gate.report import Artefact, Leg, Report
    from verification.show.write import write_report

    legs = [
        Leg(name="convert", title="C", compared="", status="pass", checks=[plain_check("convert.mean_kld", "K", 1.0)]),
        Leg(name="contract", title="C", compared="", status="pass", checks=[zero_check("contract.metadata", "M", 0)]),
    ]
    empty: dict[str, Any] = {"policy": {}, "versions": {}, "durations": {}, "legs": legs}
    file = Artefact(role="candidate", path="not-here.gguf", sha256="0" * 64, bytes=1, label="F16")
    for artefacts, code in (([file], 1), ([], 2)):  # about no file there is nothing to decide
        made = Report(verdict="pass", summary="", created="2026-01-01T00:00:00+00:00", artefacts=artefacts, **empty)
        write_report(made, tmp_path)
        assert so8t(capfd, monkeypatch, "report", tmp_path)[0] == code


def test_a_place_that_cannot_hold_the_report_is_found_before_the_measuring(
    tiny_dir: Path, candidate: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("verification.commands.verify.artefacts", lambda *a, **k: pytest.fail("measuring began"))
    arguments = ("--reference", tiny_dir, "--candidate", candidate, "--out", tmp_path / "file" / "out")
    code, _, err = so8t(capfd, monkeypatch, "verify", *arguments, "-q")
    assert code == 2
    assert "a part of the path is a file" in err


def test_gate_refuses_a_report_whose_files_changed(
    verified: Verified, tiny_dir: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, report, _ = verified
    with open(mine, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    code, _, err = so8t(capfd, monkeypatch, "gate", report)
    assert code == 2
    assert "mine.gguf changed since" in err
    mine.unlink()  # a file that is not here cannot be held against the report: its digest stands in it
    code, out, err = so8t(capfd, monkeypatch, "gate", report.parent)
    assert code == 0
    assert err == f"Not here, so not held against their digests: {mine}\n"
    assert f"Report: {report.parent / 'report.html'}" in out
    # A verification that cannot run takes the old pass away.
    broken = ("verify", "--reference", tiny_dir, "--candidate", report, "--out", report.parent, "-q")
    code, _, _ = so8t(capfd, monkeypatch, *broken)
    assert code == 2
    assert not report.exists()


def test_lint_exits_by_its_verdict(
    candidate: Path,
    tiny_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("lint", candidate, "--reference", tiny_dir, "--out", tmp_path / "out")
    code, out, _ = so8t(capfd, monkeypatch, *arguments)
    assert (code, out.splitlines()[0].split(":")[0]) == (0, "PASS")
    assert json.loads((tmp_path / "out" / "lint.json").read_text(encoding="utf-8"))["verdict"] == "pass"
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(candidate.read_bytes() + bytes(64))
    code, out, _ = so8t(capfd, monkeypatch, "lint", bad)
    assert (code, out.splitlines()[0].split(":")[0]) == (1, "FAIL")
    bad.write_bytes(candidate.read_bytes()[:-1])
    code, _, err = so8t(capfd, monkeypatch, "lint", bad)
    assert code == 2
    assert "truncated" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "the package 'peft' is not installed"),
        (ModuleNotFoundError("Could not import module 'Trainer'."), "Could not import module 'Trainer'."),
    ],
)
def test_what_cannot_be_imported_is_named(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"so8t: {said}; `so8t doctor`")
