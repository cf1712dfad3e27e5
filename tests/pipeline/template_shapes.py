"""Chat templates in the shapes that models of today ship; all texts are written for these tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

TURNS = "{% for m in messages %}"
CHATML = TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# Thinking of earlier turns is cut; the last turn gets a block, empty where it has none (the shape of Qwen3).
_LAST_BLOCK = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set said = m.content -%}{%- set thought = '' -%}
{%- if m.role == 'assistant' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1] -%}
{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""

# Markers of generation, a date in a system text of its own, an empty block in every reply (the shape of SmolLM3).
_GENERATION = """<|im_start|>system
Today is {{ strftime_now('%d %B %Y') }}.
{% if messages[0].role == 'system' %}
{{ messages[0].content }}
{% endif %}
<|im_end|>
{% for m in messages %}
{% if m.role == 'assistant' %}
{% generation %}
{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content + '<|im_end|>\n' }}
{% endgeneration %}
{% elif m.role == 'user' %}
{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}
"""

# The generation prompt opens the block; history has only what follows it (the shapes of R1's distillations and OLMo).
_OPENED = (
    TURNS + "{% set said = m.content.split('</think>')[-1].strip() if m.role == 'assistant' else m.content %}"
    "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)

# An empty block in front of every earlier reply, an open one in the generation prompt (the shape of Nemotron).
_EMPTY_IN_HISTORY = (
    TURNS + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)

# No system role, roles in turn, the reply under another name (the shape of Gemma).
_NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + TURNS
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)

# Headers, a date, tools as JSON (the shape of Llama 3).
_HEADERS = (
    "{{ bos_token }}{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "<|start|>system<|mid|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n{{ first }}"
    "{% if tools %}\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}{% endif %}<|end|>"
    "{% for m in messages %}{% if m.role != 'system' %}<|start|>{{ m.role }}<|mid|>\n\n"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{% else %}"
    "{{ m.content | trim }}{% endif %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|mid|>\n\n{% endif %}"
)

# Brackets, the system text inside the first question (the shape of Mistral).
_BRACKETS = (
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system + m.content }}[/INST]{% set ns.system = '' %}"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)

# Content as parts only (the shape of vision models).
_PARTS = (
    TURNS
    + "<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
)

# Channels for thinking and answer, another end for the last turn (the shape of gpt-oss).
_CHANNELS = (
    TURNS + "{% if m.role == 'assistant' %}{% if loop.last and m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|mid|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|mid|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|mid|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# Thinking in brackets, kept where it stands (the shape of Magistral).
_THINK_BRACKETS = (
    TURNS + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content %}[THINK]\n"
    "{{ m.reasoning_content }}\n[/THINK]\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
)

# A closed channel in the generation prompt, none in history (the shape of Gemma 4 while its thinking is off).
_CLOSED_CHANNEL = (
    "{{ bos_token }}" + TURNS + "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content.split('<channel|>')[-1] | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n"
    "{% if not enable_thinking | default(false) %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)

SPECIALS = (
    *("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    *("<|im_start|>", "<|im_end|>", "<|start|>", "<|mid|>", "<|end|>", "<|channel|>", "<|return|>", "<s>"),
    *("[INST]", "[/INST]"),
)


@dataclass(frozen=True)
class Shape:
    """One template; `base` is what its model must say in its own thinking form for steps `S` and answer `A`."""

    template: str
    base: str | None
    end: str = "<|im_end|>"
    lead: str = ""  # what the template writes between prompt and reply


SHAPES = {
    "chatml": Shape(CHATML + CHATML_PROMPT, None),
    "block in the last turn": Shape(_LAST_BLOCK, "<think>\nS\n</think>\n\nA"),
    "generation markers and a date": Shape(_GENERATION, "<think>\nS\n</think>\n\nA"),
    "opened by the prompt": Shape(_OPENED, "S\n</think>\n\nA"),
    "empty blocks in history": Shape(_EMPTY_IN_HISTORY, "\nS\n</think>\n\nA"),
    "no system role": Shape(_NO_SYSTEM, None, end="<|end|>"),
    "headers, date, tools": Shape(_HEADERS, None, end="<|end|>"),
    "brackets": Shape(_BRACKETS, None, end="<|endoftext|>", lead=" "),
    "parts": Shape(_PARTS, None),
    "a closed channel in the prompt": Shape(_CLOSED_CHANNEL, "<|channel>thought\nS\n<channel|>\n\nA", end="<turn|>"),
    "thinking in brackets": Shape(_THINK_BRACKETS, "[THINK]\nS\n[/THINK]\n\nA"),
    "channels": Shape(
        _CHANNELS,
        "<|channel|>analysis<|mid|>S<|end|><|start|>assistant<|channel|>final<|mid|>A",
        end="<|return|>",
        lead="<|channel|>final<|mid|>",
    ),
}


def shaped(tokenizer: Any, name: str) -> Any:
    """A tokenizer with a shape's template and the control tokens of all shapes."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    changed.bos_token = "<s>"
    changed.chat_template = SHAPES[name].template
    return changed
