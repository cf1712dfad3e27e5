"""Chats rendered on both sides: transformers with the reference's template, llama-cpp-python with the GGUF's.

llama-cpp-python renders the template stored in the file with Jinja (`Jinja2ChatFormatter`), which is what its users
get; llama.cpp's C function `llama_chat_apply_template` knows a fixed list of templates only and is not compared, and
neither is llama-server's own Jinja engine, which is no part of the library. A template that refuses a chat (no system
role) must be refused by both. Ids of the rendered text are compared too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import llama_cpp

from verification.contract.finding import Finding, show
from verification.contract.tokens import first_difference
from verification.engines.llama_model import LlamaModel

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
REFUSED = "(refused by the template)"


@dataclass(frozen=True)
class Rendered:
    """One chat as text on both sides."""

    name: str
    reference: str
    file: str

    @property
    def starts_with_unicode_space(self) -> bool:
        return self.name.startswith("leading U+3000")


def render_reference(tokenizer: Any, chat: Chat, *, prompt: bool) -> str:
    """A chat through transformers."""
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
    except TemplateError:
        return REFUSED


class FileTemplate:
    """The template of a GGUF file, rendered by llama-cpp-python.

    Raises:
        ValueError: the template is no Jinja; the message says where.
    """

    def __init__(self, template: str, model: LlamaModel) -> None:
        from jinja2.exceptions import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            self._make = {
                prompt: Jinja2ChatFormatter(
                    template, token_text(model, model.eos), token_text(model, model.bos), add_generation_prompt=prompt
                )
                for prompt in (False, True)
            }
        except TemplateError as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def render(self, chat: Chat, *, prompt: bool) -> str:
        """A chat as text; `REFUSED` where the template raises."""
        from jinja2.exceptions import TemplateError

        try:
            return str(self._make[prompt](messages=chat).prompt)
        except (TemplateError, ValueError, TypeError):
            return REFUSED


def token_text(model: LlamaModel, token: int) -> str:
    """A token's text; empty for none."""
    if not 0 <= token < model.vocab_size:
        return ""
    text: bytes = llama_cpp.llama_vocab_get_text(model.vocab, token)
    return text.decode("utf-8", errors="replace")


def template_text(tokenizer: Any, model: LlamaModel) -> list[Finding]:
    """The stored template against the reference's, byte for byte."""
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
    found = [render_reference(tokenizer, chat, prompt=True) for chat in CHATS.values()]
    return [text for text in found if text != REFUSED]


def render_both(tokenizer: Any, model: LlamaModel) -> Iterator[Rendered]:
    """Every fixture with and without the generation prompt, through the template each side has.

    Raises:
        ValueError: the file's template is no Jinja.
    """
    stored = model.chat_template()
    if not tokenizer.chat_template or stored is None:
        return
    template = FileTemplate(stored, model)
    for name, chat in CHATS.items():
        for prompt in (True, False):
            label = name if prompt else f"{name}, without generation prompt"
            yield Rendered(
                label, render_reference(tokenizer, chat, prompt=prompt), template.render(chat, prompt=prompt)
            )


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


def rendered_ids(tokenizer: Any, model: LlamaModel, chats: list[Rendered]) -> list[Finding]:
    """Chats whose token ids differ, each side with its own text and its own tokenizer."""
    found = []
    for chat in chats:
        if REFUSED in (chat.reference, chat.file):
            continue
        wanted = list(tokenizer(chat.reference, add_special_tokens=False, verbose=False)["input_ids"])
        actual = model.tokenize(chat.file, add_special=False)
        if wanted != actual:
            found.append(first_difference(f"of chat '{chat.name}'", wanted, actual))
    return found


def strips_unicode_space(tokenizer: Any) -> bool:
    """Whether the reference drops spaces behind special tokens: Unicode ones too, llama.cpp only ASCII."""
    return any(token.rstrip for token in getattr(tokenizer, "added_tokens_decoder", {}).values())


def end_of_turn(model: LlamaModel) -> list[Finding]:
    """The token by which the file's own template ends an answer must be one at which llama.cpp stops."""
    stored = model.chat_template()
    if stored is None:
        return []
    try:
        template = FileTemplate(stored, model)
    except ValueError as error:
        return [Finding("tokenizer.chat_template", "a Jinja template", str(error), _MEND)]
    answer = "answer seven"
    text = template.render([_HELLO, {"role": "assistant", "content": answer}], prompt=False)
    if text == REFUSED:
        return [Finding("tokenizer.chat_template", "a question and an answer rendered", REFUSED, _MEND)]
    if answer not in text:
        return [Finding("tokenizer.chat_template", "the answer's text", "a rendering without it", _MEND)]
    tail = model.tokenize(text.rsplit(answer, 1)[1], add_special=False)
    ends = [t for t in tail if llama_cpp.llama_vocab_is_control(model.vocab, t) or model.is_end(t)]
    if not ends or model.is_end(ends[0]):
        return []
    name = token_text(model, ends[0])
    action = f"set tokenizer.ggml.eot_token_id to {ends[0]}"
    return [Finding(f"token {ends[0]} {name!r}", "an end of generation, as the template ends answers with it",
                    "llama.cpp goes on", action, "never stops")]  # fmt: skip
