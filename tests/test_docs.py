"""README and docs stay true: every shell block is run, or says in the text why not; links and named files exist.

The navigation holds every page, the written parts follow from the code, and the Python page runs.

A comment directly above a block says what becomes of it; without one it is run here:

    <!-- sh: soak: REASON -->           run by `tox -e soak` only
    <!-- sh: run by: PATH -->           another test runs it
    <!-- sh: not run: REASON -->        only its `so8t` and `tox` lines are parsed, as those of all blocks are

Blocks of one document run in order, in one folder with a small random model under the names that the documents use.
`so8t serve` is started, awaited and ended; a verdict (exit code 1) of `verify`, `lint`, `run` and `report` is no error,
because a random model earns none; `verify` gets fewer chunks; pip is only written down.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import so8t_core
import verification

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
_BLOCK = re.compile(
    r"(?:<!-- sh: (?P<mode>soak|run by|not run): (?P<reason>[^\n]+) -->\n+)?```sh\n(?P<text>.*?)```", re.S
)

_SPEC = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
assert _SPEC is not None
assert _SPEC.loader is not None
write_reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(write_reference)

WRAPPER = f"""#!/bin/sh
[ "$1" = serve ] && case "$*" in *--model*|*--upstream*) exec "{sys.executable}" "{Path(__file__)}" "$@";; esac
[ "$1" = verify ] && set -- "$@" --chunks 2 --n-ctx 64
"{sys.executable}" -m pipeline.cli.main "$@"
code=$?
case "$1" in verify|lint|run|report) [ $code = 1 ] && exit 0;; esac
exit $code
"""


@dataclass(frozen=True)
class Block:
    document: str
    number: int
    mode: str | None
    reason: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Commands, without what stands in here-documents."""
        kept, end = [], None
        for line in self.text.replace("\\\n", " ").splitlines():
            if end is None:
                kept.append(line)
                end = found[1] if (found := re.search(r"<<-?'?(\w+)'?", line)) else None
            elif line == end:
                end = None
        return kept


BLOCKS = [
    Block(str(path.relative_to(ROOT)), number, found["mode"], found["reason"] or "", found["text"])
    for path in DOCUMENTS
    for number, found in enumerate(_BLOCK.finditer(path.read_text(encoding="utf-8")))
]
LINES = [(block.document, line.strip()) for block in BLOCKS for line in block.lines]


def test_no_block_is_overlooked() -> None:
    for path in DOCUMENTS:
        fences = re.findall(r"^```(?:sh|bash|shell|console)\b", path.read_text(encoding="utf-8"), re.M)
        assert len(fences) == len([b for b in BLOCKS if b.document == str(path.relative_to(ROOT))]), path.name


def test_a_block_that_another_test_runs_is_named_there() -> None:
    for block in BLOCKS:
        if block.mode == "run by":
            assert Path(block.document).name in (ROOT / block.reason).read_text(encoding="utf-8"), block
        elif block.mode:
            assert len(block.reason) > 20, f"{block.document}: give the reason"


@pytest.mark.parametrize(("document", "line"), [pair for pair in LINES if pair[1].startswith("so8t ")])
def test_every_so8t_line_parses(document: str, line: str) -> None:
    import typer

    from pipeline.cli.main import app

    words = shlex.split(re.split(r"\s[|&;>]", line)[0], comments=True)[1:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words, resilient_parsing="--help" in words)


@pytest.mark.parametrize(("document", "line"), [pair for pair in LINES if re.search(r"\btox\b.* -e ", pair[1])])
def test_every_tox_environment_exists(document: str, line: str) -> None:
    known = ConfigParser()
    known.read(ROOT / "tox.ini")
    for name in re.search(r"-e (\S+)", line)[1].split(","):  # type: ignore[index]
        assert f"testenv:{name}" in known.sections(), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(
        r"`((?:configs|tests|verification|pipeline|so8t_core|docs|scripts|benchmarks)/[\w./-]+)`", text
    ):
        assert (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, tiny_gguf: Path) -> Path:
    """Models under the names of the documents, and the programs."""
    from verification.engines.quantise import quantise

    folder = tmp_path_factory.mktemp("docs")
    for kind in ("Q8_0", "Q4_K_M"):
        quantise(tiny_gguf, folder / f"tiny-{kind}.gguf", kind)
    (folder / "bin").mkdir()
    (folder / "bin" / "so8t").write_text(WRAPPER, encoding="utf-8")
    (folder / "bin" / "pip").write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    for program in (folder / "bin").iterdir():
        program.chmod(0o755)
    return folder


def place(world: Path, folder: Path, tiny_dir: Path) -> Path:
    (folder / "runs" / "demo" / "gguf").mkdir(parents=True)
    for name in ("my-model", "my-checkpoint", "checkpoint"):
        (folder / name).symlink_to(tiny_dir)
    for name, kind in {
        "my-Q4_K_M.gguf": "Q4_K_M",
        "my-Q8_0.gguf": "Q8_0",
        "runs/demo/gguf/SmolLM2-135M-Instruct-so8t-Q8_0.gguf": "Q8_0",
    }.items():
        (folder / name).symlink_to(world / f"tiny-{kind}.gguf")
    (folder / "audit.key").write_text("k" * 64)
    (folder / "audit.key").chmod(0o600)
    bounds = "quality: {Q4_K_M: {mean_kld: 9, top1: 0}}\nevidence: {positions: 60, chunks: 2}\n"
    bounds += "convert: {mean_kld: 1.0e-3, top1: 0.5}\n"
    cells = "cells: {Q4_K_M: {mean_kld: 9, top1: 0}}\nrequired: [contract]\n"
    (folder / "gate.yaml").write_text(bounds + cells, encoding="utf-8")
    return folder


def run(world: Path, folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{world / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def check(blocks: list[Block], world: Path, folder: Path) -> None:
    for block in blocks:
        done = run(world, folder, block.text)
        assert done.returncode == 0, (
            f"{block.document}, block {block.number}:\n{block.text}\n{done.stdout}{done.stderr}"
        )


RUNNABLE = sorted({block.document for block in BLOCKS if block.mode is None})


@pytest.mark.parametrize("document", RUNNABLE)
def test_blocks_run(document: str, world: Path, tmp_path: Path, tiny_dir: Path) -> None:
    check([b for b in BLOCKS if b.document == document and b.mode is None], world, place(world, tmp_path, tiny_dir))


@pytest.mark.soak
@pytest.mark.parametrize("document", sorted({block.document for block in BLOCKS if block.mode == "soak"}))
def test_whole_documents_run(document: str, world: Path, tmp_path: Path, tiny_dir: Path) -> None:
    wanted = [b for b in BLOCKS if b.document == document and b.mode in (None, "soak")]
    check(wanted, world, place(world, tmp_path, tiny_dir))


def test_a_block_that_fails_is_seen(world: Path, tmp_path: Path, tiny_dir: Path) -> None:
    folder = place(world, tmp_path, tiny_dir)
    for script in (
        "so8t lint gone.gguf",
        "false | true",
        "so8t config-schema --surprise",
        "so8t serve --model gone.gguf",
    ):
        with pytest.raises(AssertionError):
            check([Block("x.md", 0, None, "", script)], world, folder)


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", plain, re.M):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", words.encode("ascii", "ignore").decode()))
    return found


def dead_anchors(path: Path, text: str) -> list[str]:
    """Links of a page into a heading that is not there."""
    links = re.findall(r"\]\(([^)#:]*\.md)?#([^)]+)\)", text)
    return [
        f"{page}#{anchor}"
        for page, anchor in links
        if anchor not in slugs((path.parent / page).read_text(encoding="utf-8") if page else text)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_into_a_page_find_their_heading(path: Path) -> None:
    assert dead_anchors(path, path.read_text(encoding="utf-8")) == []


def test_a_link_to_a_heading_that_is_gone_is_seen() -> None:
    text = "# Of two words\n[a](#of-two-words) [b](#of-three) [c](ci.md#signing) [d](ci.md#singing)"
    assert dead_anchors(ROOT / "docs" / "x.md", text) == ["#of-three", "ci.md#singing"]


def navigation(node: Any) -> list[str]:
    """Every page that mkdocs.yml names."""
    if isinstance(node, str):
        return [node]
    return [page for part in (node.values() if isinstance(node, dict) else node) for page in navigation(part)]


def test_the_navigation_holds_every_page_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(navigation(settings["nav"])) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in PAGES)


def test_the_start_page_leads_to_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {*re.findall(r"\]\(([^)#]+\.md)", text), "index.md"}
    assert linked == {p.relative_to(ROOT / "docs").as_posix() for p in PAGES}


def test_the_site_asks_nothing_of_the_network() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert "offline" not in str(settings["plugins"])  # it loads a script from a CDN
    assert "http" not in str([settings.get("extra_css"), settings.get("extra_javascript")])


def test_the_api_pages_name_what_is_public() -> None:
    for package in (so8t_core, verification):
        page = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text(encoding="utf-8")
        named = re.findall(rf"^::: {package.__name__}\.(\w+)$", page, re.M)
        assert sorted(named) == sorted(package.__all__)
    for path in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.M):
            assert pkgutil.resolve_name(name) is not None, name


@pytest.mark.parametrize("name", sorted(write_reference.PARTS))
def test_the_written_parts_follow_from_the_code(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == write_reference.page(name), "run python scripts/write_reference.py"


def test_a_file_that_is_missing_or_extra_in_the_tree_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "so8t_core"
    package.mkdir()
    (package / "gate.py").write_text('"""The gate."""\nx = 1\n', encoding="utf-8")
    monkeypatch.setattr(write_reference, "ROOT", tmp_path)
    before = write_reference.tree()
    assert "| `gate.py` | The gate. |" in before
    (package / "store.py").write_text('"""The store."""\n', encoding="utf-8")
    assert "| `store.py` | The store. |" in write_reference.tree() != before


def test_the_walks_name_functions_that_are_there() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| \d+ \| `([\w/]+\.py)` `(\w+)` \|", text, re.M)
    assert len(steps) == len(re.findall(r"^\| \d+ \|", text, re.M)) == 29
    for path, name in steps:
        assert hasattr(pkgutil.resolve_name(path.removesuffix(".py").replace("/", ".")), name), (path, name)


def texts_of_the_code() -> str:
    """All literal texts of the packages, the fields of f-strings left out."""
    found = []
    for package in ("so8t_core", "verification", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_the_error_page_are_the_codes_own() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    messages = [line[3:].split("` |")[0] for line in page.splitlines() if line.startswith("| `")]
    known = texts_of_the_code()
    assert len(messages) > 50
    assert [m for m in messages for part in m.split("...") if part.strip() not in known] == []


@pytest.mark.parametrize("end", ["## Verify", pytest.param("\\Z", marks=pytest.mark.soak)])
def test_the_python_page_runs(
    end: str, world: Path, tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the verification, which takes half a minute and is left to the long tests."""
    monkeypatch.chdir(place(world, tmp_path, tiny_dir))
    text = re.split(end, (ROOT / "docs" / "python.md").read_text(encoding="utf-8"))[0]
    test = doctest.DocTestParser().get_doctest(text, {}, "python.md", "python.md", 0)
    said: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert outcome.attempted > 18
    assert outcome.failed == 0, "".join(said)


def _serve_for_a_moment(arguments: list[str]) -> int:
    """What the wrapper runs instead of a server that never ends: 0 once it has announced itself and stopped cleanly."""
    command = [sys.executable, "-m", "pipeline.cli.main", *arguments, "--port", "0", "--max-new-tokens", "64"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    server.terminate()
    return server.wait() if " at http" in line else 2


if __name__ == "__main__":
    sys.exit(_serve_for_a_moment(sys.argv[1:]))
