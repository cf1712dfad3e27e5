"""Chats rendered on both sides: the reference's template as transformers does it, the GGUF's as llama-cpp-python.

Both are rendered by `ChatTemplate`, in a child process and with one frozen clock: neither template is trusted. What
differs between the two is the variables that they get. llama.cpp's C function `llama_chat_apply_template` knows a fixed
list of templates only and is not compared, and neither is llama-server's own Jinja engine, which is no part of the
library. A template that refuses a chat (no system role) must be refused by both. Ids of the rendered text are compared
too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from so8t_core.errors import InputError
from verification.contract.finding import Finding, show
from verification.contract.tokens import Tokens, first_difference
from verification.engines.chat_template import ChatTemplate, Outcome, llama_cpp_variables

Chat = list[dict[str, str]]
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
        InputError: it has several templates and no default one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # several named templates, none of them the default
            raise InputError(f"the reference's chat template cannot be chosen: {error}") from None
        self._template = ChatTemplate(source)

    def render(self, *chats: tuple[Chat, bool]) -> list[str]:
        """Each chat, with or without the generation prompt, as text; a refusal or a failure as a text in brackets."""
        plain = {**self._names, "tools": None, "documents": None}
        variables = [{**plain, "messages": chat, "add_generation_prompt": prompt} for chat, prompt in chats]
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
        """Why Jinja cannot compile the template, with the line; empty where it can."""
        return self._template.error()

    def render(self, *chats: tuple[Chat, bool]) -> list[str]:
        """Each chat, with or without the generation prompt, as text; a refusal or a failure as a text in brackets."""
        made = [llama_cpp_variables(chat, bos=self._bos, eos=self._eos, prompt=prompt) for chat, prompt in chats]
        return [_text(outcome) for outcome in self._template.render(*made)]

    def __enter__(self) -> FileTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def powers(self) -> list[Finding]:
        """What the template's text can do beside laying out a chat: facts for a person, no faults."""
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
    """A rendering's text, or the words that a comparison shows in its place."""
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
    """Every fixture that the tokenizer's template accepts, with its generation prompt; none without a template."""
    if not tokenizer.chat_template:
        return []
    reference = ReferenceTemplate(tokenizer)
    try:
        found = reference.render(*((chat, True) for chat in CHATS.values()))
    finally:
        reference.close()
    return [text for text in found if is_text(text)]


def render_both(tokenizer: Any, model: Tokens, template: FileTemplate | None = None) -> list[Rendered]:
    """Every fixture with and without the generation prompt, rendered by both sides' templates; empty where a side has
    none.

    Args:
        template: the file's, where it was opened already.
    """
    stored = model.chat_template()
    if not tokenizer.chat_template or stored is None:
        return []
    asked = [(name, chat, prompt) for name, chat in CHATS.items() for prompt in (True, False)]
    reference, theirs = ReferenceTemplate(tokenizer), template or FileTemplate(stored, model)
    try:
        sides = [side.render(*((chat, prompt) for _, chat, prompt in asked)) for side in (reference, theirs)]
    finally:
        reference.close()
        if template is None:
            theirs.close()
    names = [name if prompt else f"{name}, without generation prompt" for name, _, prompt in asked]
    return [Rendered(*row) for row in zip(names, *sides, strict=True)]


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
    """Chats whose token ids differ, each side with its own text and its own tokenizer."""
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
    """Whether the reference drops spaces behind special tokens: Unicode ones too, llama.cpp only ASCII."""
    return any(token.rstrip for token in getattr(tokenizer, "added_tokens_decoder", {}).values())


def end_of_turn(model: Tokens, template: FileTemplate | None = None) -> list[Finding]:
    """The token by which the file's own template ends an answer must be one at which llama.cpp stops.

    Args:
        template: the file's, where it was opened already.
    """
    stored = model.chat_template()
    if stored is None:
        return []
    if template is None:
        with FileTemplate(stored, model) as opened:
            return end_of_turn(model, opened)
    key, answer = "tokenizer.chat_template", "answer seven"
    if error := template.error():
        return [Finding(key, "a Jinja template", error, _MEND)]
    (text,) = template.render(([_HELLO, {"role": "assistant", "content": answer}], False))
    if not is_text(text):
        return [Finding(key, "a question and an answer rendered", text, _MEND)]
    if answer not in text:
        return [Finding(key, "the answer's text", "a rendering without it", _MEND)]
    tail = model.tokenize(text.rsplit(answer, 1)[1], add_special=False)
    ends = [t for t in tail if model.is_control(t) or model.is_end(t)]
    if not ends or model.is_end(ends[0]):
        return []
    where = f"token {ends[0]} {model.token_text(ends[0])!r}"
    wanted = "an end of generation, as the template ends answers with it"
    action = f"set tokenizer.ggml.eot_token_id to {ends[0]}"
    return [Finding(where, wanted, "llama.cpp goes on", action, "never stops")]
