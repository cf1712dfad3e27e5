"""Parameters that clients send even if they ask for nothing: only their neutral value is accepted.

Any other value is refused by the parameter's name, and so is every parameter that is on no list: logprobs, n > 1, echo,
grammar, logit_bias and similar parameters would reveal parts of the thinking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.serve.request_error import invalid

Neutral = Callable[[Any], bool]


def _one_of(*values: Any) -> Neutral:
    """A test whether a value equals one of `values`; 0 and 0.0 are equal, and False is no number."""

    def neutral(value: Any) -> bool:
        return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)

    return neutral


def _no_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(bias, int | float) and not bias for bias in value.values())


def _label(value: Any) -> bool:
    return isinstance(value, str)


def _labels(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


# A hint on how long to think; the model decides the length, and none of the thinking is shown.
_EFFORTS = _one_of("none", "minimal", "low", "medium", "high", "xhigh", "max", "default")


def _reasoning(value: Any) -> bool:
    """Whether a value is `{"effort": ...}`, another form of `reasoning_effort`."""
    rest = {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else {"": value}
    return set(rest) <= {"effort"} and all(map(_EFFORTS, rest.values()))


NEUTRAL: dict[str, tuple[Neutral, str]] = {
    "add_generation_prompt": (_one_of(True), "true"),
    "best_of": (_one_of(1), "1"),
    "chat_template_kwargs": (_one_of({}), "{}"),
    "continue_final_message": (_one_of(False), "false"),
    "echo": (_one_of(False), "false"),
    "frequency_penalty": (_one_of(0), "0"),
    "function_call": (_one_of("none", "auto"), '"none" or "auto"'),
    "functions": (_one_of([]), "[]"),
    "ignore_eos": (_one_of(False), "false"),
    "include_reasoning": (_one_of(False), "false"),
    "length_penalty": (_one_of(1), "1"),
    "logit_bias": (_no_bias, "{}"),
    "logprobs": (_one_of(False), "false"),
    "metadata": (_labels, "an object of texts"),
    "min_p": (_one_of(0), "0"),
    "min_tokens": (_one_of(0), "0"),
    "mirostat": (_one_of(0), "0"),
    "modalities": (_one_of(["text"]), '["text"]'),
    "n": (_one_of(1), "1"),
    "n_predict": (_one_of(-1), "-1"),
    "parallel_tool_calls": (_one_of(True, False), "true or false"),
    "presence_penalty": (_one_of(0), "0"),
    "prompt_cache_key": (_label, "a text"),
    "prompt_cache_retention": (_label, "a text"),
    "reasoning": (_reasoning, 'an object with an "effort"'),
    "reasoning_effort": (_EFFORTS, "low, medium, high and the like"),
    "repeat_penalty": (_one_of(1), "1"),
    "repetition_penalty": (_one_of(1), "1"),
    "response_format": (_one_of({"type": "text"}), '{"type": "text"}'),
    "safety_identifier": (_label, "a text"),
    "service_tier": (_one_of("auto", "default"), '"auto" or "default"'),
    "skip_special_tokens": (_one_of(True), "true"),
    "store": (_one_of(False), "false"),
    "tool_choice": (_one_of("none", "auto"), '"none" or "auto"'),
    "tools": (_one_of([]), "[]"),
    "top_a": (_one_of(0), "0"),
    "top_k": (_one_of(0, -1), "0 or -1"),
    "top_logprobs": (_one_of(0), "0"),
    "typical_p": (_one_of(1), "1"),
    "use_beam_search": (_one_of(False), "false"),
    "user": (_label, "a text"),
    "verbosity": (_one_of("medium"), '"medium"'),
}


_FORBIDS = {"tools": "tool_choice", "functions": "function_call"}


def without_neutral(raw: dict[str, Any]) -> dict[str, Any]:
    """A request's parameters without those that ask for nothing: nulls, neutral values, tools that may not be called.

    Raises:
        Refusal: 422, a listed parameter has another value.
    """
    kept = {}
    for name, value in raw.items():
        forbidden = name in _FORBIDS and isinstance(value, list) and raw.get(_FORBIDS[name]) == "none"
        if value is None or forbidden:
            continue
        if name not in NEUTRAL:
            kept[name] = value
        elif not NEUTRAL[name][0](value):
            message = f"`{name}` is not supported here: leave it out, or give {NEUTRAL[name][1]}"
            raise invalid(message, param=name, code="unsupported_parameter")
    return kept
