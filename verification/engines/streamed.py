"""Runs a reference that does not fit into memory one decoder layer at a time, from the checkpoint's shards.

The outer loop is over layers, the inner over passages. Every passage runs the model's forward in its own thread, which
stops before each decoder layer. When all passages wait for a layer, the layer's weights are read, the layer is applied
to one passage after another, and the weights are dropped. Masks, rotary tables, per-layer inputs, shared keys and the
arithmetic are the model's own. Passages are never concatenated: the logits equal the whole model's, bit by bit. The
embedding is read by rows and a large head by slices. Only one thread works at a time. accelerate's offloading is not
used: it reads all weights again for every forward, so once a passage.

The hidden states may be kept on disk after each layer (`keep`): a run that was killed continues at that layer. Models
whose layers share more than hidden states (shared keys and values) start again from the first layer.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from so8t_core.checkpoint_admission import admit_checkpoint
from so8t_core.errors import InputError
from so8t_core.files import atomic_file
from verification.reference.families import OTHER_TOWERS

Ids = npt.NDArray[np.int64]
Tell = Callable[[int, int], None]
WHOLE_HEAD = 1 << 30  # bytes in float32 up to which the whole head stays in memory
SLICE = 1 << 24  # weights of a larger head in float32 at a time
_UNITS = 100  # units of progress for one decoder layer


class StreamedModel:
    """A causal LM whose decoder layers are in memory one at a time; float32, for evaluation.

    Args:
        directory: directory of the checkpoint.
        adapter: directory of an SO8T adapter that is attached to the checkpoint.
        keep: directory for the hidden states of a run that may be killed; None keeps nothing.
        folder: the temporary directory of the checkpoint, if it is in one; kept as long as the model.

    Raises:
        InputError: the checkpoint is refused, or its family cannot be run layer by layer.
    """

    def __init__(
        self, directory: str | Path, *, adapter: Path | None = None, keep: Path | None = None, folder: Any = None
    ) -> None:
        self.directory, self.keep, self._folder = Path(directory), keep, folder
        admit_checkpoint(self.directory)
        model, target = _skeleton(self.directory), _skeleton(self.directory)
        self.config, self.device = model.config, torch.device("cpu")
        body = getattr(model, model.base_model_prefix or "?", None)
        if not isinstance(body, nn.Module) or body is model:
            raise InputError(f"{self.directory}: a {type(model).__name__} has no body apart from its head to stream")
        modules, layers, head = dict(model.named_modules()), _decoder_layers(model), model.get_output_embeddings()
        self._shards = _Shards(self.directory, target, modules, layers)
        if adapter is not None:
            model = self._shards.attach(model, adapter)
        self.model, self._body, self._layers = model, body, [modules[name] for name in layers]
        read = [*self._shards.paths, *(sorted(adapter.iterdir()) if adapter else ())]
        self._identity = " ".join(f"{path.resolve()} {path.stat().st_mtime_ns}" for path in read)
        self._known: dict[bytes, Any] = {}
        self._by_rows(modules, head)
        self._shards.load("")
        _refuse_unbuilt(model, (*self._shards.streamed, *self._shards.apart))

    def prepare(self, passages: Sequence[Ids], tell: Tell = lambda done, total: None) -> None:
        """Run the body over all passages, layer by layer; their final hidden states stay in memory.

        Args:
            tell: called with (done, total), in hundredths of a layer.
        """
        run = _LayerByLayer(self, passages, tell)
        self._known |= {_key(tokens): output for tokens, output in zip(passages, run.outputs(), strict=True)}

    def body_output(self, tokens: Ids) -> Any:
        """The body's output for these tokens (n,), computed now if they were not prepared."""
        if _key(tokens) not in self._known:
            self.prepare([tokens])
        return self._known[_key(tokens)]

    @contextlib.contextmanager
    def known(self, tokens: Ids) -> Iterator[Any]:
        """In this context, the model with a body that returns its output for these tokens (n,): only the head runs."""
        output = self.body_output(tokens)
        self._body.forward = lambda *_, **__: output
        try:
            yield self.model
        finally:
            del self._body.forward

    def forget(self) -> None:
        """Drop all hidden states, and the head."""
        self._known.clear()
        self._shards.head = None

    def head_units(self, rows: int, tokens: int) -> int:
        """The head's cost for `rows` positions, in hundredths of a layer's cost for `tokens` positions."""
        text = self.config.get_text_config()
        layer = sum(p.numel() for p in self._layers[0].parameters())
        return int(_UNITS * text.vocab_size * text.hidden_size * rows / (max(layer, 1) * max(tokens, 1)))

    def __call__(self, input_ids: Tensor, **more: Any) -> Any:
        """The whole model's output for one passage, ids (1, n)."""
        with self.known(input_ids[0].numpy()) as model:
            return model(input_ids, **more)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the model, for hooks on the inputs of layers."""
        return self.model.named_modules()  # type: ignore[no-any-return]

    def _by_rows(self, modules: Mapping[str, nn.Module], head: Any) -> None:
        """Let embeddings outside the layers read only the requested rows, and let the head read slices."""
        for name, module in modules.items():
            key = f"{name}.weight"
            if key in self._shards.apart and isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._shards.rows_of(key))
        if isinstance(head, nn.Linear):
            name = next(name for name, module in modules.items() if module is head)
            source = self._shards.head_source(f"{name}.weight", self.model)
            self._shards.apart.setdefault(f"{name}.weight", self._shards.apart[source])
            head.forward = partial(self._shards.head_of, source, head)  # type: ignore[method-assign]


def _key(tokens: Ids) -> bytes:
    return np.asarray(tokens, dtype=np.int64).tobytes()


def _skeleton(directory: Path) -> Any:
    """The model without weights; buffers that are not in a checkpoint are computed by the model's code."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"transformers cannot build {directory}: {' '.join(str(error).split())[:300]}") from None
    return model.eval()


def _decoder_layers(model: Any) -> list[str]:
    """Names of the text model's decoder layers.

    Raises:
        InputError: the model has no list of decoder layers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    lists = {name: m for name, m in lists.items() if not any(part in f"{name}." for part in OTHER_TOWERS)}
    if not lists:
        raise InputError(f"a {type(model).__name__} has no list of {count} decoder layers to stream")
    found = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return [f"{found}.{number}" for number in range(count)]


def _refuse_unbuilt(model: Any, allowed: tuple[str, ...]) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = name.replace(".base_layer.", ".")
        other = any(part in plain for part in OTHER_TOWERS)
        if tensor.is_meta and not other and not plain.startswith(allowed):
            raise InputError(
                f"{name} is in no file of the checkpoint, so the model cannot be streamed; use --no-stream"
            )


class _Shards:
    """Loads the checkpoint's tensors into the model's modules in groups: each layer, and the tensors outside."""

    def __init__(self, directory: Path, target: Any, modules: Mapping[str, nn.Module], layers: Sequence[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        weights, _ = admit_checkpoint(directory)
        self.paths = weights.paths
        self.head: Tensor | None = None  # (V, width) float32, if it is small enough
        self._file_of, self._target, self._by_name = weights.file_of, target, modules
        self._mapping = get_model_conversion_mapping(target)
        self.streamed = tuple(f"{name}." for name in layers)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = target.state_dict()
        self._groups: dict[str, list[str]] = {}
        sources: dict[str, str] = {}
        for key in self._file_of:
            name, converter = rename_source_key(key, renamings, converters, target.base_model_prefix, state)
            if name not in state and key in state:
                name, converter = key, None
            group = next((layer for layer in self.streamed if name.startswith(layer)), "")
            self._groups.setdefault(group, []).append(key)
            if converter is None:
                sources[name] = key
        head = target.get_output_embeddings()
        wide = {f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Embedding)}
        wide |= {f"{n}.weight" for n, m in target.named_modules() if m is head and isinstance(m, nn.Linear)}
        # tensors outside the layers that are read by rows or slices: name in the model -> name in the files
        self.apart = {name: key for name, key in sources.items() if name in wide and not self._is_streamed(name)}
        self._groups[""] = [
            key
            for key in self._groups.get("", [])
            if key not in self.apart.values() and not any(part in key for part in OTHER_TOWERS)
        ]
        self._empty = dict(target.named_parameters())

    def _is_streamed(self, name: str) -> bool:
        return name.startswith(self.streamed)

    def attach(self, model: Any, adapter: Path) -> Any:
        """The model with a saved adapter; the adapter's weights are all in memory."""
        from so8t_core import load_adapter

        for name, value in self._empty.items():  # PEFT puts an adapter on its layer's device: not meta
            self._put(name, nn.Parameter(torch.zeros(()).expand(value.shape), requires_grad=False))
        try:
            return load_adapter(model, adapter)
        finally:
            self.drop("")

    def load(self, group: str) -> None:
        """Read a layer's tensors (or, for "", those outside the layers) as `from_pretrained` does, in float32."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(weight_mapping=self._mapping, dtype=torch.float32, device_map={"": "cpu"})
        with contextlib.ExitStack() as files, _silent():
            opened: dict[Path, Any] = {}
            state = {}
            for key in self._groups.get(group, []):
                path = self._file_of[key]
                if path not in opened:
                    opened[path] = files.enter_context(safe_open(str(path), framework="pt"))
                state[key] = opened[path].get_slice(key)
            convert_and_load_state_dict_in_model(self._target, state, config)
        wanted = [n for n in self._empty if (n.startswith(group) if group else not self._is_streamed(n))]
        for name in wanted:
            value = self._target.get_parameter(name)
            if not value.is_meta:
                self._put(name, value)
        if group:
            for name in wanted:
                if self._target.get_parameter(name).is_meta:
                    raise InputError(f"{name} is in no file of the checkpoint; use --no-stream")

    def drop(self, group: str) -> None:
        """Free a layer's tensors, or, for "", all tensors of the model."""
        for name in self._empty:
            if name.startswith(group):
                self._put(name, self._empty[name])
                parent, _, leaf = name.rpartition(".")
                _set(self._target.get_submodule(parent), leaf, self._empty[name])

    def _put(self, name: str, value: Any) -> None:
        parent, _, leaf = name.rpartition(".")
        _set(self._by_name[parent], leaf, value.requires_grad_(False))

    def rows_of(self, name: str) -> Callable[[Any, Any], Any]:
        """A hook that runs before an embedding: it reads the rows of the requested ids and renumbers the ids."""

        def read(module: Any, inputs: Any) -> Any:
            ids, places = inputs[0].unique(return_inverse=True)
            with self._slice(name) as stored:
                rows = torch.cat([stored[int(i) : int(i) + 1] for i in ids]).float()
            _set(module, "weight", rows)
            return (places, *inputs[1:])

        return read

    def head_source(self, name: str, model: Any) -> str:
        """The tensor of the head, which is the embedding's tensor if the two are tied."""
        if name in self.apart:
            return name
        if not (model.config.tie_word_embeddings or model.config.get_text_config().tie_word_embeddings):
            raise InputError(f"{name} is in no file of the checkpoint, and the model is not tied")
        embedding = model.get_input_embeddings()
        return next(f"{n}.weight" for n, m in self._by_name.items() if m is embedding)

    def head_of(self, name: str, head: nn.Linear, x: Tensor) -> Tensor:
        """x (..., width) -> (..., V): the head's product, with its whole weight or slice by slice."""
        with self._slice(name) as stored:
            rows, width = stored.get_shape()
            if self.head is None and 4 * rows * width <= WHOLE_HEAD:
                self.head = stored[:].float()
            if self.head is not None:
                return nn.functional.linear(x, self.head, head.bias)
            step = max(1, SLICE // width)
            parts = [(start, min(start + step, rows)) for start in range(0, rows, step)]
            bias = [None if head.bias is None else head.bias[a:b] for a, b in parts]
            done = [nn.functional.linear(x, stored[a:b].float(), c) for (a, b), c in zip(parts, bias, strict=True)]
        return torch.cat(done, dim=-1)

    @contextlib.contextmanager
    def _slice(self, name: str) -> Iterator[Any]:
        key = self.apart[name]
        with safe_open(str(self._file_of[key]), framework="pt") as shard:
            yield shard.get_slice(key)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """In this context, transformers shows no progress bar for each layer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Finished(BaseException):
    """Ends a passage's forward after the body: the head runs later."""


@dataclass(eq=False)
class _Passage:
    """One passage's forward and the layer that it waits for."""

    tokens: Ids
    turn: threading.Event = field(default_factory=threading.Event)
    layer: int | None = None  # the layer it waits for; None before the first layer and after the body
    call: Callable[[], Any] | None = None
    result: Any = None
    output: Any = None
    error: BaseException | None = None
    stopped: bool = False


class _LayerByLayer:
    """One pass of many passages through the layers."""

    def __init__(self, streamed: StreamedModel, passages: Sequence[Ids], tell: Tell) -> None:
        self.streamed, self.tell = streamed, tell
        self.passages = [_Passage(np.asarray(tokens, dtype=np.int64)) for tokens in passages]
        self.back = threading.Event()
        self.current: _Passage | None = None
        self.start, self.hidden = 0, list[Tensor]()
        self.resumable = not getattr(streamed.config.get_text_config(), "num_kv_shared_layers", 0)

    def outputs(self) -> list[Any]:
        """The body's output for each passage."""
        layers = self.streamed._layers
        forwards = [layer.forward for layer in layers]
        body_forward = self.streamed._body.forward
        self._resume()
        for number, layer in enumerate(layers):
            layer.forward = self._waiting(number, forwards[number])
        self.streamed._body.forward = self._ending(body_forward)
        threads = [threading.Thread(target=self._forward, args=(p,), daemon=True) for p in self.passages]
        try:
            with torch.inference_mode():
                for passage, thread in zip(self.passages, threads, strict=True):
                    self._advance(passage, thread.start)
                self._through(len(layers))
        finally:
            for passage in self.passages:  # after an error some still wait for a layer
                passage.stopped = True
                passage.turn.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for layer in layers:
                del layer.forward
            del self.streamed._body.forward
        return [passage.output for passage in self.passages]

    def _through(self, count: int) -> None:
        total = count * _UNITS
        while waiting := [p for p in self.passages if p.layer is not None]:
            number = min(p.layer for p in waiting if p.layer is not None)
            group = self.streamed._shards.streamed[number]
            self.tell(number * _UNITS, total)
            self.streamed._shards.load(group)
            here = [p for p in waiting if p.layer == number]
            hidden = []
            for passage in here:
                call, passage.call = passage.call, None
                assert call is not None
                passage.result = call()
                first = passage.result[0] if isinstance(passage.result, tuple) else passage.result
                hidden.append(first)
                passage.layer = None
                self._advance(passage, passage.turn.set)
            self.streamed._shards.drop(group)
            if len(here) == len(self.passages):
                self._store(number + 1, hidden)
        self.tell(total, total)
        if self.streamed.keep is not None:
            self._file().unlink(missing_ok=True)

    def _advance(self, passage: _Passage, go: Callable[[], None]) -> None:
        """Let one passage run until it waits for a layer or ends."""
        self.back.clear()
        self.current = passage
        go()
        self.back.wait()
        if passage.error is not None:
            raise passage.error

    def _forward(self, passage: _Passage) -> None:
        """The work of a passage's thread: the model's forward up to the end of its body."""
        try:
            ids = torch.from_numpy(passage.tokens)[None]
            with torch.inference_mode():
                self.streamed.model(input_ids=ids, use_cache=False)
        except _Finished:
            pass
        except BaseException as error:
            passage.error = error
        finally:
            passage.layer = None
            self.back.set()

    def _ending(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            passage = self.current
            assert passage is not None
            passage.output = forward(*args, **more)
            raise _Finished

        return run

    def _waiting(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward that requests the layer and waits until it was applied."""

        def run(*args: Any, **more: Any) -> Any:
            passage = self.current
            assert passage is not None
            if number < self.start:
                return self.hidden[self.passages.index(passage)]
            self.resumable &= not any(isinstance(value, dict) for value in (*args, *more.values()))
            passage.turn.clear()
            passage.layer, passage.call = number, lambda: forward(*args, **more)
            self.back.set()
            passage.turn.wait()
            if passage.stopped:
                raise _Finished
            result, passage.result = passage.result, None
            return result

        return run

    def _file(self) -> Path:
        assert self.streamed.keep is not None
        texts = hashlib.sha256(b"|".join(_key(p.tokens) for p in self.passages))
        texts.update(self.streamed._identity.encode())
        return self.streamed.keep / f"hidden-{texts.hexdigest()[:16]}.safetensors"

    def _store(self, layer: int, hidden: Sequence[Tensor]) -> None:
        """Store the hidden states after `layer` layers; the disk always holds whole states of one layer."""
        if self.streamed.keep is None or not self.resumable or any(not isinstance(h, Tensor) for h in hidden):
            return
        tensors = {str(place): value.contiguous() for place, value in enumerate(hidden)}
        with atomic_file(self._file()) as temporary:
            save_file(tensors, temporary, metadata={"layer": str(layer)})

    def _resume(self) -> None:
        if self.streamed.keep is None or not self._file().is_file():
            return
        try:
            with safe_open(str(self._file()), framework="pt") as stored:
                hidden = [stored.get_tensor(str(place)) for place in range(len(self.passages))]
                self.start, self.hidden = int(stored.metadata()["layer"]), hidden
        except (SafetensorError, KeyError, TypeError, ValueError):  # foreign or damaged file: start at the first layer
            self._file().unlink()


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Give a module another parameter, (..) of any shape."""
    setattr(module, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False))
