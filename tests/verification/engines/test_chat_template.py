"""A stranger's template: rendered as the two libraries do it, in a child that may die."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from transformers.utils.chat_template_utils import render_jinja_template

from verification.contract import chat
from verification.engines import chat_template
from verification.engines.chat_template import CLOCK, ChatTemplate, Outcome, llama_cpp_variables
from verification.engines.child import Child, ChildDied, Limits
from verification.fault_catalogue.models import PHI3_CHAT, TURNS

pytestmark = pytest.mark.usefixtures("cold_children")  # their limits and deaths are what is tested

LOOPS = """{% for m in messages %}{{ m.role }}: {{ m.content | trim }}
{% if loop.last %}{% break %}{% endif %}{% endfor %}"""
COUNT = """{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"""
MACRO = """{% macro say(m) %}<{{ m.role }}>{{ m['content'] }}{% endmacro %}
{% for m in messages %}{{ say(m) }}{% endfor %}"""
HEALTHY = {
    "turns": TURNS,
    "phi3": PHI3_CHAT,
    "loop controls": LOOPS,
    "json": "{{ messages | tojson(indent=2) }}{{ {'ä': [1, none, true]} | tojson }}",
    "a namespace": COUNT,
    "a macro": MACRO,
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "specials": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}>{% endif %}",
    "undefined": "{{ tools is defined }}{{ nothing }}{{ tools is none }}",
}
BOTH = [(name, text, prompt) for name, text in chat.CHATS.items() for prompt in (True, False)]


@pytest.mark.parametrize("name", HEALTHY)
def test_the_child_renders_what_transformers_and_llama_cpp_python_render(name: str) -> None:
    source = HEALTHY[name]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    with ChatTemplate(source) as template:
        made = [llama_cpp_variables(c, bos="<s>", eos="</s>", prompt=prompt) for _, c, prompt in BOTH]
        theirs = template.render(*made)
        variables = [
            {**names, "tools": None, "documents": None, "messages": c, "add_generation_prompt": prompt}
            for _, c, prompt in BOTH
        ]
        ours = template.render(*variables)
    for (_, messages, prompt), one, other in zip(BOTH, ours, theirs, strict=True):
        rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt, **names)
        assert (one.kind, one.text) == ("text", rendered[0])
        formatter = Jinja2ChatFormatter(source, "</s>", "<s>", add_generation_prompt=prompt)
        assert (other.kind, other.text) == ("text", formatter(messages=messages).prompt)


HOSTILE = {
    "a text of ten gigabytes": ("{{ 'x' * 10**10 }}", "MemoryError"),
    "a list of ten billion": ("{{ [0] * 10**10 }}", "MemoryError"),
    "three nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "SIGXCPU, over 1 s of processor time",
    ),
    "a power": ("{{ 9 ** (9 ** 9) }}", "SIGXCPU"),
    "a division": ("{{ 1 // 0 }}", "ZeroDivisionError: integer division or modulo by zero"),
    "a range": ("{{ range(10**9) | list | length }}", "OverflowError: Range too big"),
    "a macro without an end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "nine million characters": ("{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}", "more than 1048576"),
    "another file": ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment"),
    "a walk": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "a walk through format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
    "a change": ("{{ messages.append(1) }}", "SecurityError"),
    "no function": ("{{ open('/etc/passwd').read() }}", "UndefinedError"),
    "a type": ("{{ messages + 1 }}", "TypeError"),
    "no Jinja": ("{% for %}", "TemplateSyntaxError"),
    "an unknown tag": ("{% evil %}", "TemplateSyntaxError: Encountered unknown tag 'evil'"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
    "two megabytes": ("x" * (2 << 20), "2097152 characters, at most 1048576"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_does_not_end_well_is_an_outcome(name: str) -> None:
    source, words = HOSTILE[name]
    before = os.times()
    with ChatTemplate(source, limits=Limits(memory=1 << 28, cpu=1.0, wall=120.0)) as template:
        (outcome,) = template.render({"messages": [{"role": "user", "content": "x"}]})
        assert outcome.kind == "failed"
        assert words in outcome.text
        template.powers()  # read or not, it ends
    after = os.times()  # processor time: what the clock shows depends on what else runs here
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5


def test_a_role_that_a_template_refuses_is_no_failure() -> None:
    with ChatTemplate("{{ raise_exception('only users: ' ~ messages[0].role) }}") as template:
        (outcome,) = template.render({"messages": [{"role": "system", "content": ""}]})
    assert (outcome.kind, outcome.text) == ("refused", "only users: system")


def test_a_child_that_died_is_started_again() -> None:
    source = """{{ 'x' * messages[0].content|length * n }}
{%- for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}"""
    with ChatTemplate(source, limits=Limits(memory=1 << 28, cpu=1.0, wall=120.0)) as template:
        messages = [{"role": "user", "content": "abc"}]
        assert "SIGXCPU" in template.render({"messages": messages, "n": 90_000})[0].text
        assert template.render({"messages": messages, "n": 1})[0].text == "xxx"


def test_the_clock_stands_still() -> None:
    with ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}") as template:
        first = template.render({})[0].text
        time.sleep(0.01)
        assert template.render({})[0].text == first == CLOCK.strftime("%Y-%m-%d %H:%M:%S.%f")
        asked = datetime.datetime(2030, 5, 6)
        assert template.render({}, now=asked)[0].text.startswith("2030-05-06 00:00:00")


def test_a_child_takes_less_than_a_third_of_a_second() -> None:
    """The processor time that a child adds to a rendering; the time on the clock depends on what else runs."""
    before = os.times()
    with ChatTemplate(TURNS) as template:
        assert template.render(*(llama_cpp_variables(c, bos="", eos="", prompt=True) for c in chat.CHATS.values()))
    after = os.times()
    added = sum(
        getattr(after, part) - getattr(before, part) for part in ("user", "system", "children_user", "children_system")
    )
    assert added < 0.3


CHILD = """
import os, sys
sys.path[0] = sys.argv[2]
from verification.engines.child import serve
def answer(question):
    kind = question["do"]
    if kind == "signal": os.kill(os.getpid(), question["signal"])
    if kind == "exit": print("GGML_ASSERT(x) failed", file=sys.stderr); os._exit(3)
    if kind == "flood": return {"x": "y" * 10_000}
    if kind == "print": print("noise", flush=True); os.write(1, b"more"); sys.stderr.write("z" * (3 << 20))
    if kind == "sleep":
        import time; time.sleep(60)
    return {"got": len(question.get("text", ""))}
serve(lambda: answer)
"""


def test_a_childs_death_has_a_name(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    limits = Limits(memory=1 << 28, cpu=5.0, wall=20.0, answer=5000)

    def ask(**question: Any) -> dict[str, Any]:
        with Child(script, limits, name="x") as child:
            return child.ask(question)

    assert ask(do="echo", text="a" * 1_000_000) == {"got": 1_000_000}
    assert ask(do="print") == {"got": 0}  # what a library prints is no answer, and does not fill the disk
    for question, words in (
        ({"do": "signal", "signal": 6}, "x ended: SIGABRT"),
        ({"do": "signal", "signal": 11}, "x ended: SIGSEGV"),
        ({"do": "exit"}, r"x ended: exit status 3: GGML_ASSERT\(x\) failed"),
        ({"do": "flood"}, "an answer of more than 5000 bytes"),
    ):
        with pytest.raises(ChildDied, match=words):
            ask(**question)
    limits = Limits(memory=1 << 28, cpu=5.0, wall=1.0)
    with pytest.raises(ChildDied, match="no answer within 1 s"):
        ask(do="sleep")


@pytest.mark.parametrize("name", HEALTHY)
def test_the_code_of_the_child_gives_the_childs_answers(name: str) -> None:
    source = HEALTHY[name]
    code = chat_template._Renderer()
    assert code.answer({"do": "source", "source": source}) == {}
    assert code.answer({"do": "compile"}) == {"error": ""}
    variables = [llama_cpp_variables(c, bos="<s>", eos="</s>", prompt=prompt) for _, c, prompt in BOTH]
    found = code.answer({"do": "render", "variables": variables, "now": CLOCK.isoformat()})
    with ChatTemplate(source) as template:
        assert [Outcome(**outcome) for outcome in found["outcomes"]] == template.render(*variables)
        assert code.answer({"do": "powers"})["powers"] == template.powers()


HARMLESS = ("a division", "a range", "nine million characters", "another file", "a walk", "no function", "a type")
NOT_COMPILED = ("no Jinja", "an unknown tag")


@pytest.mark.parametrize("name", [*HARMLESS, *NOT_COMPILED])
def test_the_code_of_the_child_fails_as_the_child_does(name: str) -> None:
    source, words = HOSTILE[name]
    variables = {"messages": [{"role": "user", "content": "x"}]}
    code = chat_template._Renderer()
    code.answer({"do": "source", "source": source})
    found = code.answer({"do": "render", "variables": [variables], "now": CLOCK.isoformat()})
    with ChatTemplate(source) as template:
        (outcome,) = template.render(variables)
        assert (outcome.kind, words in outcome.text) == ("failed", True)
        assert template.error() == code.answer({"do": "compile"})["error"]
        assert bool(template.error()) == (name in NOT_COMPILED)
        assert code.answer({"do": "powers"}).get("powers", []) == template.powers()
    ours = found["error"] or found["outcomes"][0]["text"]
    assert ours == outcome.text


def test_a_refusal_and_the_time_in_this_process() -> None:
    code = chat_template._Renderer()
    code.answer({"do": "source", "source": "{{ raise_exception('at ' ~ strftime_now('%Y')) }}"})
    found = code.answer({"do": "render", "variables": [{}], "now": "2030-05-06T00:00:00"})
    assert found["outcomes"] == [{"kind": "refused", "text": "at 2030"}]
