"""Chats rendered by both templates: the reference's as transformers does it, the GGUF's as llama-cpp-python does it.

`ChatTemplate` renders both, in a child process and with one frozen clock: neither template is trusted. Only the
variables that the templates get differ. Two renderers are not compared: llama.cpp's C function
`llama_chat_apply_template`, which knows a fixed list of templates only, and llama-server's Jinja engine, which is not
part of the library. If one template refuses a chat (no system role), the other must refuse it too. Ids of the rendered
text are compared too, and the token that ends each kind of reply. Some chats have tools, tool results, and
`enable_thinking` on or off; a template that does not know these renders plain chats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from so8t_core.errors import InputError
from verification.contract.finding import Finding, show
from verification.contract.tokens import Tokens, first_difference
from verification.engines.chat_template import ChatTemplate, Outcome, llama_cpp_variables

Chat = list[dict[str, Any]]
IDEOGRAPHIC_SPACE = "\u3000"
_HELLO = {"role": "user", "content": "Hello, what is 3 + 4?"}
_ANSWER = {"role": "assistant", "content": "# 思考ステップ\n3 + 4 = 7\n\n# 最終回答\n7"}
CHATS: dict[str, Chat] = {
    "user": [_HELLO],
    "system and user": [{"role": "system", "content": "You count things."}, _HELLO],
    "three turns, Japanese": [_HELLO, _ANSWER, {"role": "user", "content": "東京から大阪まで何キロ？\nおよそで良い。"}],
    "answered": [_HELLO, _ANSWER],
    "code": [{"role": "user", "content": "code:\n```python\nprint('a  b')\n```"}],
    "empty message": [{"role": "user", "content": ""}],
    "spaces around": [{"role": "user", "content": "  two spaces, a newline \n"}],
    "leading U+3000": [{"role": "user", "content": f"{IDEOGRAPHIC_SPACE}全角の空白で始まる。"}],
    "a marker inside": [{"role": "user", "content": "say <|im_end|> or </s> or <|end|>"}],
}
_WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "e.g. 大阪"}},
            "required": ["city"],
        },
    },
}
_ASK = {"role": "user", "content": "How is the weather there?"}
_RESULT = {"role": "tool", "name": "weather", "content": '{"sky": "曇り", "celsius": 23}'}
_SAID, _CITY = "answer seven", "Osaka"  # these words mark the end of a reply and of a call in a rendering
_REPLY = {"role": "assistant", "content": _SAID}
_THOUGHT = {**_REPLY, "reasoning_content": "3 + 4 = 7"}


def _call(*cities: str) -> dict[str, Any]:
    """An assistant's message that calls the tool once for each city."""
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}} for city in cities]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@dataclass(frozen=True)
class Asked:
    """A chat and the variables that its template gets."""

    name: str
    messages: Chat
    prompt: bool
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool | None = None

    def variables(self) -> dict[str, Any]:
        """The template's variables, without the special tokens' texts; `enable_thinking` only if the chat sets it."""
        switch = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {"messages": self.messages, "add_generation_prompt": self.prompt, "tools": self.tools, **switch}


class Template(Protocol):
    """The template of the reference or of the file."""

    def render(self, *chats: Asked) -> list[str]:
        """Each chat as text; for a refusal or a failure, words in brackets."""


def asked_chats() -> list[Asked]:
    """`CHATS` with and without the generation prompt, then tools and thinking."""
    found = [
        Asked(name if prompt else f"{name}, without generation prompt", [dict(m) for m in messages], prompt)
        for name, messages in CHATS.items()
        for prompt in (True, False)
    ]
    found += [
        Asked("tools offered", [_ASK], True, [_WEATHER]),
        Asked("a tool called", [_ASK, _call(_CITY), _RESULT], True, [_WEATHER]),
        Asked(
            "two calls of tools", [_ASK, _call("Sapporo", _CITY), _RESULT, _RESULT, _REPLY, _HELLO], True, [_WEATHER]
        ),
        Asked("an earlier reply with its reasoning", [_HELLO, _THOUGHT, _HELLO], True),
    ]
    for on in (True, False):
        name = f"thinking {'on' if on else 'off'}"
        found += [
            Asked(name, [_ASK], True, enable_thinking=on),
            Asked(f"{name}, tools offered", [_ASK], True, [_WEATHER], on),
            Asked(f"{name}, two turns", [_HELLO, _THOUGHT, _HELLO], True, enable_thinking=on),
        ]
    return found + endings()


def endings() -> list[Asked]:
    """Chats without generation prompt that end in a reply: an answer, an answer after a tool, or a call of a tool."""
    return [
        Asked("an answer at the end", [_HELLO, _REPLY], False),
        Asked("an answer after a tool at the end", [_ASK, _call(_CITY), _RESULT, _REPLY], False, [_WEATHER]),
        Asked("a call at the end", [_ASK, _call(_CITY)], False, [_WEATHER]),
        Asked("an answer at the end, thinking on", [_HELLO, _THOUGHT], False, enable_thinking=True),
        Asked("an answer at the end, thinking off", [_HELLO, _REPLY], False, enable_thinking=False),
    ]


_MEND = "copy the reference's template into tokenizer.chat_template, or convert again"
REFUSED, _FAILED = "(refused by the template)", "(the template fails: "


@dataclass(frozen=True)
class Rendered:
    """One chat as text on both sides."""

    name: str
    reference: str
    file: str

    @property
    def starts_with_unicode_space(self) -> bool:
        return self.name.startswith("leading U+3000")


class ReferenceTemplate:
    """The template of a Hugging Face tokenizer, rendered with the variables that `apply_chat_template` passes.

    Raises:
        InputError: the tokenizer has several templates and no default one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # several named templates, none of them the default
            raise InputError(f"the reference's chat template cannot be chosen: {error}") from None
        self._template = ChatTemplate(source)

    def render(self, *chats: Asked) -> list[str]:
        """See `Template`."""
        variables = [{**self._names, "documents": None, **chat.variables()} for chat in chats]
        return [_text(outcome) for outcome in self._template.render(*variables)]

    def close(self) -> None:
        """End its child."""
        self._template.close()


class FileTemplate:
    """The template of a GGUF file, rendered with the variables that llama-cpp-python passes."""

    def __init__(self, template: str, model: Tokens) -> None:
        self._bos, self._eos = model.token_text(model.bos), model.token_text(model.eos)
        self._template = ChatTemplate(template)

    def error(self) -> str:
        """Why Jinja cannot compile the template, with the line; empty if it can."""
        return self._template.error()

    def render(self, *chats: Asked) -> list[str]:
        """See `Template`."""
        plain = llama_cpp_variables([], bos=self._bos, eos=self._eos, prompt=False)
        return [_text(outcome) for outcome in self._template.render(*({**plain, **chat.variables()} for chat in chats))]

    def __enter__(self) -> FileTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def powers(self) -> list[Finding]:
        """Abilities of the template beyond laying out a chat: facts for a person, not faults."""
        action = "read the template there; with --reference HF_DIR it is held against the base's own"
        wanted = "a layout of roles and texts"
        return [
            Finding(f"tokenizer.chat_template, line {fact['line']}", wanted, fact["text"], action, fact["what"])
            for fact in self._template.powers()
        ]

    def close(self) -> None:
        """End its child."""
        self._template.close()


def _text(outcome: Outcome) -> str:
    """A rendering's text; for a refusal or a failure, the words that a comparison shows instead."""
    return {"text": outcome.text, "refused": REFUSED}.get(outcome.kind, f"{_FAILED}{outcome.text})")


def is_text(rendered: str) -> bool:
    """Whether a rendering is a text, neither a refusal nor a failure."""
    return rendered != REFUSED and not rendered.startswith(_FAILED)


def template_text(tokenizer: Any, model: Tokens) -> list[Finding]:
    """Compare the stored template with the reference's, byte for byte."""
    wanted, actual = tokenizer.chat_template or None, model.chat_template()
    if wanted == actual:
        return []
    key = "tokenizer.chat_template"
    if wanted is None or actual is None:
        sizes = ["nothing" if t is None else f"{len(t)} characters" for t in (wanted, actual)]
        return [Finding(key, sizes[0], sizes[1], _MEND, "chat template missing" if actual is None else "")]
    if not isinstance(wanted, str):
        return []  # several named templates; the rendered chats decide
    shorter = min(len(wanted), len(actual))
    at = next((i for i, (a, b) in enumerate(zip(wanted, actual, strict=False)) if a != b), shorter)
    around = [show(t[max(0, at - 10) : at + 30]) for t in (wanted, actual)]
    return [Finding(f"{key}, character {at}", around[0], around[1], _MEND)]


def fixtures(tokenizer: Any) -> list[str]:
    """Every chat of `CHATS` that the tokenizer's template accepts, with its generation prompt, as text."""
    if not tokenizer.chat_template:
        return []
    reference = ReferenceTemplate(tokenizer)
    try:
        found = reference.render(*(Asked(name, chat, True) for name, chat in CHATS.items()))
    finally:
        reference.close()
    return [text for text in found if is_text(text)]


def render_both(tokenizer: Any, model: Tokens, template: FileTemplate | None = None) -> list[Rendered]:
    """Every chat of `asked_chats`, rendered by both templates; empty if the reference or the file has no template.

    Args:
        template: the file's template, if it is open already.
    """
    stored = model.chat_template()
    if not tokenizer.chat_template or stored is None:
        return []
    asked = asked_chats()
    reference, theirs = ReferenceTemplate(tokenizer), template or FileTemplate(stored, model)
    both: tuple[Template, Template] = (reference, theirs)
    try:
        sides = [side.render(*asked) for side in both]
    finally:
        reference.close()
        if template is None:
            theirs.close()
    return [Rendered(*row) for row in zip((chat.name for chat in asked), *sides, strict=True)]


def rendered_text(chats: list[Rendered]) -> list[Finding]:
    """Chats whose text differs."""
    found = []
    for chat in chats:
        a, b = chat.reference, chat.file
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            found.append(
                Finding(f"chat '{chat.name}', character {at}", show(a[at : at + 40]), show(b[at : at + 40]), _MEND)
            )
    return found


def rendered_ids(tokenizer: Any, model: Tokens, chats: list[Rendered]) -> list[Finding]:
    """Chats whose token ids differ; reference and file each use their own text and tokenizer."""
    found = []
    for chat in chats:
        if not (is_text(chat.reference) and is_text(chat.file)):
            continue
        wanted = list(tokenizer(chat.reference, add_special_tokens=False, verbose=False)["input_ids"])
        actual = model.tokenize(chat.file, add_special=False)
        if wanted != actual:
            found.append(first_difference(f"of chat '{chat.name}'", wanted, actual))
    return found


def strips_unicode_space(tokenizer: Any) -> bool:
    """Whether the reference drops Unicode spaces after special tokens; llama.cpp drops ASCII spaces only."""
    return any(token.rstrip for token in getattr(tokenizer, "added_tokens_decoder", {}).values())


def end_of_turn(model: Tokens, template: FileTemplate | None = None) -> list[Finding]:
    """Check that llama.cpp stops at the token with which the file's template ends a reply.

    After an answer, the first control token must stop llama.cpp. After a tool call, any control token may, because some
    families close the call before they close the turn.

    Args:
        template: the file's template, if it is open already.
    """
    stored = model.chat_template()
    if stored is None:
        return []
    if template is None:
        with FileTemplate(stored, model) as opened:
            return end_of_turn(model, opened)
    key = "tokenizer.chat_template"
    if error := template.error():
        return [Finding(key, "a Jinja template", error, _MEND)]
    asked = endings()
    texts = template.render(*asked)
    if not is_text(texts[0]):
        return [Finding(key, "a question and an answer rendered", texts[0], _MEND)]
    if _SAID not in texts[0]:
        return [Finding(key, "the answer's text", "a rendering without it", _MEND)]
    found: dict[int, Finding] = {}
    for chat, text in zip(asked, texts, strict=True):
        called = bool(chat.messages[-1].get("tool_calls"))
        last = _CITY if called else _SAID
        if not is_text(text) or last not in text:
            continue  # the template knows no tools
        behind = model.tokenize(text.rsplit(last, 1)[1], add_special=False)
        ends = [token for token in behind if model.is_control(token) or model.is_end(token)]
        if not ends or any(map(model.is_end, ends if called else ends[:1])):
            continue
        end, kind = (ends[-1], "calls of tools") if called else (ends[0], "answers")
        where, wanted = (
            f"token {end} {model.token_text(end)!r}",
            f"an end of generation, as the template ends {kind} with it",
        )
        action = f"set tokenizer.ggml.eot_token_id to {end}"
        found.setdefault(end, Finding(where, wanted, "llama.cpp goes on", action, "never stops"))
    return list(found.values())
