"""Finds the abilities of a chat template beyond laying out a chat, from Jinja's syntax tree.

A template that tests the user's words can treat some users differently (a backdoor inserts an instruction if a trigger
word occurs). Listed are: comparisons, tests and searches on the content of `messages`, but not on its structure (role,
tool calls, positions); changes of such text by `replace`; addresses; long texts that are put into the prompt; the date;
attributes with an underscore and names of Jinja's internals, with which templates have run code in engines without a
sandbox. These are facts about the text, not faults: healthy templates search for `</think>`. This module runs in the
template's child (`verification.engines.chat_template`), because parsing an untrusted text may not end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2 import nodes

_MARKER = re.compile(r"[<>|\[\]_/]|^\W*$")  # a role marker, a key or punctuation, not a user's word
LONG = 200  # characters of one literal; a system message of one or two sentences is shorter
_STRUCTURE = frozenset({"role", "name", "type", "tool_calls", "tool_call_id", "id", "function"})
_SIZES = frozenset({"length", "count"})  # filters whose value does not depend on the words
_PLACES = frozenset({"startswith", "endswith", "find", "rfind", "index", "rindex", "count", "get"})
_PARTS = frozenset({"replace", "translate", "split", "rsplit", "partition", "rpartition"})
_SEARCHES = _PLACES | _PARTS  # methods
_FILTERS = frozenset({"replace", "select", "reject", "selectattr", "rejectattr"})
_TEXT_TESTS = frozenset({"in", "eq", "equalto", "sameas", "==", "ne", "!="})
Literals = dict[str, list[str]]  # a name -> the texts in the expressions that it is set to
_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]{1,15}://|www\.)[^\s'\"<>)]+", re.IGNORECASE)


def powers(tree: nodes.Template) -> list[dict[str, str]]:
    """Facts as {"what": kind, "line": number, "text": detail}, without duplicates; plain words first, then markers."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for what, line, text in _facts(tree):
        found.setdefault((what, text), {"what": what, "line": str(line), "text": text[:200]})
    return sorted(found.values(), key=lambda fact: (_rank(fact), int(fact["line"]), fact["text"]))


def _rank(fact: dict[str, str]) -> int:
    """The order for a reader: questions about words, code, addresses, then markers, dates, long texts."""
    words = any(not _MARKER.search(word) for word in re.findall(r"'([^']+)'", fact["text"]))
    if fact["what"] == "condition on content":
        return 0 if words else 3
    return {"internal attribute": 1, "other template": 1, "address": 2}.get(fact["what"], 4)


def _facts(tree: nodes.Template) -> Iterator[tuple[str, int, str]]:
    written, constants = _written(tree), _constants(tree)
    for node in _walk(tree):
        line = node.lineno or 1
        if isinstance(node, nodes.Const | nodes.TemplateData):
            text = node.value if isinstance(node, nodes.Const) else node.data
            if not isinstance(text, str):
                continue
            for address in _ADDRESS.findall(text):
                yield "address", line, address
            if len(" ".join(text.split())) > LONG:
                yield "long text", line, f"{len(text)} characters: {' '.join(text.split())[:60]}..."
        elif isinstance(node, nodes.Name) and node.name == "strftime_now":
            yield "date", line, "strftime_now"
        elif isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            yield "internal attribute", line, node.attr
        elif isinstance(node, nodes.Getitem) and (walked := [t for t in _literals(node.arg, constants) if "__" in t]):
            yield "internal attribute", line, walked[0]
        elif isinstance(node, nodes.Filter) and (node.name == "attr" or _names_internals(node, constants)):
            words = [text for value in _arguments(node) for text in _literals(value, constants)]
            yield "internal attribute", line, f"|{node.name}({', '.join(words)})"
        elif isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
            yield "other template", line, type(node).__name__.lower()
        question = _question(node, written, constants)
        if question is not None:
            yield "condition on content", line, question


def _question(node: nodes.Node, written: set[str], constants: Literals) -> str | None:
    """A question about the content of a message, or a change of it by a search; None for any other node."""

    def words(*parts: nodes.Node) -> str:
        found = [text for part in parts for text in _literals(part, constants)]
        return ", ".join(repr(text) for text in dict.fromkeys(found) if text.strip())

    def says(*parts: nodes.Node) -> bool:
        return any(_says(part, written) for part in parts)

    if isinstance(node, nodes.Compare):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if says(*sides) and not all(_is_bare(side) or says(side) for side in sides):
            return words(*sides) or "a computed text"
    elif isinstance(node, nodes.Getitem):
        if not isinstance(node.arg, nodes.Const | nodes.Slice) and says(node.arg):
            return f"[...] of {words(node.node) or 'a computed table'}"
    elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES:
        known = node.node.attr == "get" and _literals_only(node.args) & _STRUCTURE
        if not known and ((says(node.node.node) and words(*node.args)) or says(*node.args)):
            return f".{node.node.attr}({words(node.node.node, *node.args)})"
    elif isinstance(node, nodes.Filter) and node.name in _FILTERS and node.node is not None:
        given = _arguments(node)
        by_structure = node.name.endswith("attr") and given and _literals_only(given[:1]) <= _STRUCTURE
        if not by_structure and ((says(node.node) and words(*given)) or says(*given)):
            return f"|{node.name}({words(node.node, *given)})"
    elif isinstance(node, nodes.Test) and node.name in _TEXT_TESTS:
        given = list(node.args or [])
        if (says(node.node) and words(*given)) or says(*given):
            return f"is {node.name} {words(node.node, *given)}"
    return None


def _says(node: nodes.Node, written: set[str]) -> bool:
    """Whether an expression's value may hold the content of a message."""
    if isinstance(node, nodes.Name):
        return node.name in written
    if isinstance(node, nodes.Getattr):
        if isinstance(node.node, nodes.Name) and f"{node.node.name}.{node.attr}" in written:
            return True
        return node.attr not in _STRUCTURE and _says(node.node, written)
    if isinstance(node, nodes.Getitem):
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        return key not in _STRUCTURE and _says(node.node, written)
    if isinstance(node, nodes.Filter):
        return node.name not in _SIZES and node.node is not None and _says(node.node, written)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
        return not (_literals_only(node.args) & _STRUCTURE) and _says(node.node, written)
    if isinstance(node, nodes.Test | nodes.Compare):
        return False  # a truth value: `_question` examines the node itself
    return any(_says(child, written) for child in node.iter_child_nodes())


def _written(tree: nodes.Template) -> set[str]:
    """Names that may hold a message or its text: from `messages` through assignments, loops and macros."""
    found = {"messages", "message", "conversation"}
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    every, before = list(_walk(tree)), -1
    while len(found) != before:  # until nothing is added
        before = len(found)
        for node in every:
            if isinstance(node, nodes.Assign | nodes.For | nodes.AssignBlock):
                if any(_says(value, found) for value in _assigned(node)):
                    found |= _targets(node.target)
            elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in macros:
                names = [argument.name for argument in macros[node.node.name].args]
                found |= {name for name, value in zip(names, node.args, strict=False) if _says(value, found)}
                found |= {pair.key for pair in node.kwargs if _says(pair.value, found)}
    return found


def _assigned(node: nodes.Assign | nodes.For | nodes.AssignBlock) -> list[nodes.Node]:
    """The expressions that the names on the left are set to."""
    if isinstance(node, nodes.AssignBlock):
        return list(node.body)
    return [node.node if isinstance(node, nodes.Assign) else node.iter]


def _targets(node: nodes.Node) -> set[str]:
    """Names that an assignment sets; "ns.text" for an attribute of a namespace."""
    plain = {child.name for child in _walk(node) if isinstance(child, nodes.Name)}
    return plain | {f"{child.name}.{child.attr}" for child in _walk(node) if isinstance(child, nodes.NSRef)}


def _constants(tree: nodes.Template) -> Literals:
    """Names and the texts in the expressions that they are set to or loop over."""
    found: Literals = {}
    for node in _walk(tree):
        if isinstance(node, nodes.Assign | nodes.For):
            texts = _literals(node.node if isinstance(node, nodes.Assign) else node.iter, {})
            for name in _targets(node.target):
                found.setdefault(name, []).extend(texts)
    return found


def _literals(node: nodes.Node, constants: Literals) -> list[str]:
    """The texts in an expression, including the texts that its names are set to."""
    found: list[str] = []
    for child in _walk(node):
        if isinstance(child, nodes.Const) and isinstance(child.value, str):
            found.append(child.value)
        elif isinstance(child, nodes.Name):
            found += constants.get(child.name, [])
    return [text for text in found if text != "content"]  # the key, in message['content']


def _literals_only(parts: list[nodes.Expr]) -> set[str]:
    return {part.value for part in parts if isinstance(part, nodes.Const) and isinstance(part.value, str)}


def _arguments(node: nodes.Filter) -> list[nodes.Expr]:
    return [*(node.args or []), *(pair.value for pair in node.kwargs or [])]


def _names_internals(node: nodes.Filter, constants: Literals) -> bool:
    """Whether a filter names internals, as `map(attribute='__class__')` does."""
    return any("__" in text for value in _arguments(node) for text in _literals(value, constants))


def _is_bare(node: nodes.Node) -> bool:
    """Whether a node is a number, a truth value, none or an empty text, so not a word."""
    return isinstance(node, nodes.Const) and not (isinstance(node.value, str) and node.value.strip())


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    """The node and all nodes below it, without recursion: an untrusted tree may have any depth."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(list(node.iter_child_nodes())))
