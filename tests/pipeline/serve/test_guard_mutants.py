"""Mutation test of the guard: every small change to its source, its forms or its folding is caught by a law."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from guard_kits import KITS, Kit
from guard_laws import LAWS, law_silence
from mutation import load, mutants

from pipeline.serve import guard
from pipeline.serve import text_folding as folding
from pipeline.serve.forms import harmony, pair, separated, so8t
from so8t_core.errors import InputError

# how a form is made of its module
FORMS: dict[ModuleType, Callable[[Any, Kit], Any]] = {
    so8t: lambda module, kit: module.So8t(),
    pair: lambda module, kit: module.Pair(kit.name, *kit.form.markers),
    harmony: lambda module, kit: module.Harmony(),
    separated: lambda module, kit: module.Separated(),
}


def module_of(kit: Kit) -> ModuleType:
    """The module of a kit's form."""
    return sys.modules[type(kit.form).__module__]


def source_of(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")


@contextmanager
def exchanged(module: ModuleType, source: str) -> Iterator[ModuleType]:
    """Another source of the folding, in every module that imported from it."""
    other, undo = load(source, "exchanged"), []
    for user in (guard, *FORMS):
        for name, value in vars(module).items():
            if not name.startswith("__") and vars(user).get(name) is value and hasattr(other, name):
                undo.append((user, name, value))
                setattr(user, name, getattr(other, name))
    try:
        yield other
    finally:
        for user, name, value in undo:
            setattr(user, name, value)


UNTOLD = "both tags need a letter or digit, and neither may hold the other"
ODD_PAIRS = {
    ("---", "***"): UNTOLD,
    ("<a>", "***"): UNTOLD,
    ("ab", "xaby"): UNTOLD,
    ("xaby", "ab"): UNTOLD,
    ("<think><think>", "</x>"): "one tag must be one word in brackets, or a few plain words",
}


def pairs_are_checked(module: Any) -> None:
    """Two tags that cannot be told apart are refused in words; different words for opening and closing are none."""
    for tags, words in ODD_PAIRS.items():
        with pytest.raises(InputError) as caught:
            module.Pair("x...y", *tags)
        assert str(caught.value) == f"--think-form 'x...y': {words}"
    module.Pair("x...y", "<plan>", "</done>")


def thoughts_are_lines(module: Any) -> None:
    """Several messages of thinking are accounted for as lines."""
    text = "<|channel|>analysis<|message|>α<|end|><|start|>assistant<|channel|>commentary<|message|>β"
    text += "<|end|><|start|>assistant<|channel|>final<|message|>abc"
    assert module.Harmony().split(text, "", mixed=False).steps == "α\nβ"


def hold(module: ModuleType, source: str, laws: Iterable[Callable[..., None]]) -> None:
    """Every law, on every form that another source of the module touches."""
    laws = list(laws)
    if module is guard:
        judged = load(source, "guard_mutant")
        for kit in KITS.values():
            for law in laws:
                law(judged, kit)
    elif module is folding:
        with exchanged(folding, source):
            for kit in KITS.values():
                again = module_of(kit)
                for law in laws:
                    law(guard, replace(kit, form=FORMS[again](again, kit)))
    else:
        changed = load(source, "form_mutant")
        if module is pair:
            pairs_are_checked(changed)
        if module is harmony:
            thoughts_are_lines(changed)
        for kit in (kit for kit in KITS.values() if module_of(kit) is module):
            for law in laws:
                law(guard, replace(kit, form=FORMS[module](changed, kit)))


def survivors(module: ModuleType, laws: Iterable[Callable[..., None]]) -> tuple[list[str], int]:
    """Keys of the mutants that no law catches, and how many there were."""
    alive, count = [], 0
    for mutant in mutants(Path(str(module.__file__))):
        count += 1
        try:
            hold(module, mutant.source, laws)
        except (Exception, pytest.fail.Exception):
            continue
        alive.append(mutant.key)
    return alive, count


MODULES = [guard, folding, *FORMS]
NAMES = [module.__name__.rpartition(".")[2] for module in MODULES]
# Changes that change nothing: `reasoning + data` is made of bytes whatever its second part is.
SAME = {
    "Guard.close | bytes(self._data) | call dropped",
    "Separated | False | flipped (number 2)",  # without any reasoning `split` has raised before this is asked
    "Pair.__init__ | '|>' | text changed",  # a skeleton has no capital letters
    "Harmony.split | for step in steps if step | filter dropped",  # for the type checker: none is None there
}


@pytest.mark.soak  # the control of the test below; that the laws hold for the module itself is in test_guard.py
@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_laws_hold_for_the_source_read_back(module: ModuleType) -> None:
    hold(module, source_of(module), [law for name, law in LAWS.items() if name != "law_time"])


@pytest.mark.soak
@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_no_mutant_survives(module: ModuleType) -> None:
    alive, count = survivors(module, LAWS.values())
    assert set(alive) - SAME == set()
    assert count > 20


@pytest.mark.soak
def test_mutants_survive_laws_that_are_too_few() -> None:
    alive, count = survivors(guard, [law_silence])
    assert len(alive) > count // 4
