"""An Ollama Modelfile: template, stop set, context length and the shared system message.

The Go template is derived from the model's own chat template by rendering probes: with the system text S, prompts U,
V and answer A, rendering S U A V gives  a S b U c A d V c ; where b == d one line serves every turn. Otherwise no
template is guessed: a comment in the file says this, and Ollama reads the template inside the GGUF.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.data.render import render, writes_the_date
from pipeline.data.think_form import SYSTEM_MESSAGE, RowError
from pipeline.release.stop_set import stop_ids

S, U, A, V = "so8tprobesystem", "so8tprobeuser", "so8tprobeanswer", "so8tprobesecond"


def go_template(tokenizer: Any) -> str | None:
    """The chat template as a Go template for Ollama, or None where the turns are not uniform."""
    messages = [
        {"role": "system", "content": S},
        {"role": "user", "content": U},
        {"role": "assistant", "content": A},
        {"role": "user", "content": V},
    ]
    try:
        text = render(tokenizer, messages, prompt=True)
    except RowError:
        return None
    if writes_the_date(tokenizer) or any(text.count(probe) != 1 for probe in (S, U, A, V)):
        return None
    a, rest = text.split(S)
    b, rest = rest.split(U)
    c, rest = rest.split(A)
    d, last = rest.split(V)
    if b != d or c != last or any("{{" in part for part in (a, b, c)):
        return None
    bos = tokenizer.bos_token
    if bos and a.startswith(bos) and not a.startswith(b):
        ids = tokenizer("x").input_ids
        if ids and ids[0] == tokenizer.bos_token_id:
            a = a.removeprefix(bos)  # llama.cpp adds BOS itself; two would change the function
    return f"{{{{ if .System }}}}{a}{{{{ .System }}}}{{{{ end }}}}{b}{{{{ .Prompt }}}}{c}{{{{ .Response }}}}"


def stop_tokens(directory: Path, tokenizer: Any) -> list[str]:
    """Every token text that ends a turn (`stop_set`), in id order.

    Raises:
        InputError: the model names no stop token.
    """
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids(directory, tokenizer)]


def modelfile(gguf_name: str, directory: Path, tokenizer: Any, n_ctx: int, system: str | None = SYSTEM_MESSAGE) -> str:
    """Text of the Modelfile for the GGUF file beside it; `system` None for a model without a system message."""
    lines = [
        f"# Made by so8t. Use: ollama create NAME -f {gguf_name.removesuffix('.gguf')}.Modelfile",
        f"FROM ./{gguf_name}",
    ]
    template = go_template(tokenizer)
    if template is None:
        lines.append("# No TEMPLATE: this model's turns are not uniform; Ollama reads the template inside the GGUF.")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    if system is not None:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{token}"' for token in stop_tokens(directory, tokenizer)]
    lines.append(f"PARAMETER num_ctx {n_ctx}")
    return "\n".join(lines) + "\n"
