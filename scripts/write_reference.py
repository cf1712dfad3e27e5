"""Write the parts of docs/ that are made from the code: the tree of files in design.md, the commands in commands.md.

    python scripts/write_reference.py

Each part stands between two comments, `<!-- NAME -->` and `<!-- end of NAME -->`. A file's line is the first sentence
of its docstring; a command's text is its help. A test compares the pages with the code (tests/test_docs.py).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("so8t", "so8t_core", "verification", "pipeline")
KINDS = {".py", ".yaml", ".txt", ".j2", ".json"}  # py.typed is empty


def first_sentence(path: Path) -> str:
    """A file's line in the table: a docstring's start, a YAML file's first comment, or a JSON file's "about"."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    elif path.suffix == ".yaml":
        said = text.partition("\n")[0].removeprefix("#") if text.startswith("#") else ""
    elif path.suffix == ".json":
        said = str(json.loads(text).get("about", ""))
    else:
        said = {".j2": f"The template of {path.stem}.", ".txt": "The text that is scored by default."}[path.suffix]
    line = " ".join(said.split()) or "(no words of its own)"
    return line.replace("|", "\\|").replace("<", "&lt;")


def folders(package: Path) -> Iterator[Path]:
    """The package and every folder in it that holds files, in the order of their names."""
    yield package
    yield from sorted(f for f in package.rglob("*") if f.is_dir() and any(p.suffix in KINDS for p in f.iterdir()))


def files(folder: Path) -> list[Path]:
    """The files of a folder, without an `__init__.py` that is only a docstring, which describes the folder."""
    own = sorted(path for path in folder.iterdir() if path.suffix in KINDS)
    return [path for path in own if path.name != "__init__.py" or len(ast.parse(path.read_text("utf-8")).body) > 1]


def tree() -> str:
    """The folders as a tree, then a table of files for each."""
    rooms = [f for name in PACKAGES if (ROOT / name).is_dir() for f in folders(ROOT / name)]
    names = {room: "    " * (len(room.relative_to(ROOT).parts) - 1) + room.name + "/" for room in rooms}
    width = max(map(len, names.values())) + 2
    lines = ["```text", *(f"{names[room]:{width}}{_room(room)}".rstrip() for room in rooms), "```"]
    for room in rooms:
        if own := files(room):
            lines += ["", f"### {room.relative_to(ROOT).as_posix()}", "", "| file | holds |", "|---|---|"]
            lines += [f"| `{path.name}` | {first_sentence(path)} |" for path in own]
    return "\n".join(lines)


def _room(folder: Path) -> str:
    path = folder / "__init__.py"
    if path.is_file() and (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""):
        return first_sentence(path).replace("&lt;", "<")
    return ""


def commands() -> str:
    """Every command of `so8t` with its arguments and options."""
    import typer

    from pipeline.cli.main import app

    return "\n\n".join(_command("so8t", typer.main.get_command(app)))


def _command(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from _command(f"{name} {word}", inner)
        return
    shown = [p for p in command.params if p.name != "help"]
    arguments = " ".join(
        str(p.metavar) if p.required else f"[{p.metavar} ...]" for p in shown if p.param_type_name == "argument"
    )
    options = [p for p in shown if p.param_type_name == "option"]
    yield f"## {name}"
    yield " ".join(command.help.split("\f")[0].split())
    usage = " ".join(part for part in (name, arguments, "[OPTIONS]" if options else "") if part)
    yield f"```text\n{usage}\n{command.epilog}\n```"
    if options:
        rows = [f"| `{_names(p)}` | {_default(p)} | {(p.help or '').replace('|', '/')} |" for p in options]
        yield "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def _names(option: Any) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar or option.type.name.upper()}"


def _default(option: Any) -> str:
    value = option.default
    if option.is_flag:
        return "on" if value else ""
    return "" if value is None or callable(value) or str(value).startswith("Sentinel") else f"`{value}`"


PARTS = {"design.md": ("tree", tree), "commands.md": ("commands", commands)}


def page(name: str) -> str:
    """The text of docs/NAME with its generated part written again."""
    mark, make = PARTS[name]
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- end of {mark} -->")
    if not end:
        raise SystemExit(f"docs/{name} lacks the comments <!-- {mark} --> and <!-- end of {mark} -->")
    return f"{before}<!-- {mark} -->\n{make()}\n{end}{after}"


if __name__ == "__main__":
    for name in PARTS:
        (ROOT / "docs" / name).write_text(page(name), encoding="utf-8")
