"""A language model's head apart from its body: the body's last hidden states, and logits made from them later.

logits = head(h), h (T, width) being what the body returns: behind its last norm. The head is not rebuilt here: the
model's own forward runs with a body that answers with the stored h, so a soft-cap, a scale of the logits and a bias are
the model's own. Rows that are asked for together as they were the first time give the same bits: the same product.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from verification.engines.positions import Array, Ids


def body_of(model: Any) -> Any:
    """The part of a transformers model below its head; None where it has none, or somebody else's forward on it."""
    from torch import nn

    body = getattr(model, getattr(model, "base_model_prefix", "") or "?", None)
    usable = isinstance(body, nn.Module) and body is not model and "forward" not in vars(body)
    return body if usable else None


@contextlib.contextmanager
def body_runs_once(model: Any) -> Iterator[list[Any]]:
    """Inside, the model's body answers every call with what it gave the first time; that is yielded in a list."""
    body, kept = body_of(model), list[Any]()
    if body is None:
        yield kept  # the whole model runs for every call
        return
    forward = body.forward

    def once(*args: Any, **more: Any) -> Any:
        if not kept:
            kept.append(forward(*args, **more))
        return kept[0]

    with _forward_of(body, once):
        yield kept


@contextlib.contextmanager
def _forward_of(body: Any, forward: Callable[..., Any]) -> Iterator[None]:
    body.forward = forward
    try:
        yield
    finally:
        del body.forward


class ModelHead:
    """The head of a model that has run; the body's own weights are freed by `keep_only_head`.

    Args:
        model: as `open_reference` gives it, whole or streamed.
    """

    def __init__(self, model: Any) -> None:
        from verification.engines.streamed import StreamedModel

        self._streamed = model if isinstance(model, StreamedModel) else None
        self._model = model.model if isinstance(model, StreamedModel) else model
        self._output: Any = None  # the class of what the body returns

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def usable(self) -> bool:
        """Whether head and body can be run apart."""
        takes = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        return takes and body_of(self._model) is not None

    def hidden(self, tokens: Ids, first: int, stop: int) -> Array:
        """(stop - first, width) float32: the body's last hidden states at these positions.

        Raises:
            TypeError: the body returns no `last_hidden_state` of the declared width.
        """
        import torch

        if self._streamed is not None:
            output = self._streamed.body_output(tokens)
        else:
            ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(self._model.device)
            with torch.inference_mode(), body_runs_once(self._model) as kept:
                self._model(input_ids=ids, use_cache=False, logits_to_keep=1)
            output = kept[0]
        found = getattr(output, "last_hidden_state", None)
        if found is None or found.shape[-1] != self.width or found.dtype != torch.float32:
            raise TypeError(f"a {type(self._model).__name__} has no hidden states that its head takes")
        self._output = type(output)
        result: Array = found[0, first:stop].cpu().numpy()
        return result

    def logits(self, hidden_TW: Array) -> Array:
        """(T, V) float32 of hidden states (T, width)."""
        import torch

        h_1TW = torch.from_numpy(hidden_TW)[None].to(self._model.device)
        output = self._output(last_hidden_state=h_1TW)
        ids = torch.zeros((1, len(hidden_TW)), dtype=torch.int64, device=h_1TW.device)
        keep = torch.arange(len(hidden_TW), device=h_1TW.device)
        with torch.inference_mode(), _forward_of(body_of(self._model), lambda *_, **__: output):
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
        result: Array = logits.float().cpu().numpy()
        return result

    def keep_only_head(self) -> None:
        """Free what the head does not need: the weights of the body, or a streamed model's hidden states."""
        if self._streamed is not None:
            self._streamed.forget()
            return
        head = self._model.get_output_embeddings()
        own = {id(p) for p in head.parameters()} if head is not None else set()
        for parameter in body_of(self._model).parameters():
            if id(parameter) not in own:  # a tied head is the embedding
                parameter.data = parameter.data.new_empty(0)
