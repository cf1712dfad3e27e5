"""Runs a language model's body and head separately: stores the body's last hidden states, makes logits from them later.

logits = head(h); h (T, width) is the body's output, after its last norm. The head is not rebuilt here: the model's own
forward runs with a body that returns the stored h. So a soft-cap, a scale of the logits and a bias are applied as in
the model. The same rows requested together give the same bits, because the matrix product is the same.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from verification.engines.positions import Array, Ids


def body_of(model: Any) -> Any:
    """The part of a transformers model below its head; None if there is none, or if its forward was replaced."""
    from torch import nn

    body = getattr(model, getattr(model, "base_model_prefix", "") or "?", None)
    usable = isinstance(body, nn.Module) and body is not model and "forward" not in vars(body)
    return body if usable else None


@contextlib.contextmanager
def body_runs_once(model: Any) -> Iterator[list[Any]]:
    """In this context, the model's body runs once and then returns its first output again; yields a list with it."""
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
    """The head of a model; `keep_only_head` frees the weights of the body.

    Args:
        model: a model from `open_reference`, whole or streamed.
    """

    def __init__(self, model: Any) -> None:
        from verification.engines.streamed import StreamedModel

        self._streamed = model if isinstance(model, StreamedModel) else None
        self._model = model.model if isinstance(model, StreamedModel) else model
        self._output: Any = None  # class of the body's output

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def usable(self) -> bool:
        """Whether head and body can run separately."""
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
        """Logits (T, V), float32, from hidden states (T, width)."""
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
        """Free the weights of the body, or a streamed model's hidden states; the head does not need them."""
        if self._streamed is not None:
            self._streamed.forget()
            return
        head = self._model.get_output_embeddings()
        own = {id(p) for p in head.parameters()} if head is not None else set()
        for parameter in body_of(self._model).parameters():
            if id(parameter) not in own:  # a tied head is the embedding
                parameter.data = parameter.data.new_empty(0)
