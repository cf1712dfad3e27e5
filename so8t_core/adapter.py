"""SO8T as a PEFT method: every target becomes an SO8TLinear, y = inner(gate(x)), where inner is a Linear or a LoRA.

The order is fixed by construction: rotation outside, LoRA inside, so the function is (W + s B A) @ R. Every target is
wrapped and only the chosen layers get gates, so that one model can carry adapters with different layers. Targets that
read the same tensor share one gate: the first target owns it, the others follow it.
State-dict names: <module>.lora_so8t.theta (n, 28) and the gate's other tensors, on the module that owns the gate, and
<module>.base_layer.lora_{A,B}.weight for a LoRA inside.
Source: PEFT's BaseTuner contract (peft 0.21).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from so8t_core.config import ALL_LINEAR, METHOD, SO8TConfig
from so8t_core.errors import InputError
from so8t_core.exponential import BLOCK
from so8t_core.gate import RotationGate, refresh_apart, refresh_together
from so8t_core.shared_input import shared_inputs

PREFIX = "lora_"  # see SO8TLinear.adapter_layer_names and transformers.load_adapter
# Linear layers that choose experts: "all-linear" leaves them out, so that the model chooses as the base does
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class SO8TLinear(nn.Module, BaseTunerLayer):
    """gate, then the wrapped layer. forward: x (..., in) -> (..., out)."""

    lora_so8t: nn.ModuleDict
    active_adapters: list[str]  # BaseTunerLayer has this and get_base_layer
    get_base_layer: Callable[[], nn.Linear]
    merged_adapters: list[str]
    guard: RemovableHandle | None = None  # of the hook `_refuse_outer_adapter`

    adapter_layer_names: tuple[str, ...] = ("lora_so8t",)
    other_param_names: tuple[str, ...] = ("followed",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_so8t = nn.ModuleDict()
        self.followed: dict[str, RotationGate] = {}  # gates of other layers that read the same tensor
        self.merged_adapters = []
        self._active_adapter = adapter_name
        linear = self.get_base_layer()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def add_gate(self, adapter_name: str, *, init_scale: float, layer: str, **options: Any) -> None:
        """Give adapter `adapter_name` a rotation here; `options` are those of RotationGate."""
        gate = RotationGate(self.in_features, init_scale=init_scale, layer=layer, **options)
        device = self.get_base_layer().weight.device
        self.lora_so8t[adapter_name] = gate if gate.theta.is_meta else gate.to(device)

    def follow(self, adapter_name: str, gate: RotationGate) -> None:
        """Let adapter `adapter_name` turn this input with the gate of another layer, which reads the same tensor."""
        self.followed[adapter_name] = gate
        gate.readers += 1

    def gate(self, adapter_name: str) -> RotationGate | None:
        """The gate that turns this input for `adapter_name`: this layer's gate, or that of the layer it follows."""
        gate = self.lora_so8t[adapter_name] if adapter_name in self.lora_so8t else self.followed.get(adapter_name)
        assert gate is None or isinstance(gate, RotationGate)
        return gate

    def active_gates(self) -> list[RotationGate]:
        """Gates in the order in which x passes through them."""
        return [gate for name in self.active_adapters if (gate := self.gate(name)) is not None]

    def gates_in_use(self) -> list[RotationGate]:
        """The active gates that the next forward applies; an empty list while adapters are disabled or merged."""
        return [] if self.disable_adapters or self.merged else self.active_gates()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        for gate in self.gates_in_use():
            x = gate(x, self)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold into the weight in place: LoRA first, then W @ R, with one rounding for each.

        Raises:
            InputError: quantised weights, another adapter merged already, or with `safe_merge` a non-finite rotation.
        """
        names = [n for n in (adapter_names or self.active_adapters) if n not in self.merged_adapters]
        if not names:
            return
        if self.merged_adapters:  # a second LoRA would be added to weights that are rotated already
            raise InputError(
                f"{', '.join(self.merged_adapters)} is merged already; unmerge first, then merge all at once"
            )
        linear = self.get_base_layer()
        if type(linear) is not nn.Linear:
            raise InputError(
                f"{type(linear).__name__} holds quantised weights; a merge would bake the quantisation in. "
                "Bake from the original checkpoint: bake_checkpoint(base_dir, adapter_dir, out_dir)"
            )
        for name in names if safe_merge else ():
            gate = self.gate(name)
            if gate is not None and not all(bool(torch.isfinite(p).all()) for p in gate.parameters()):
                raise InputError(f"adapter {name} has a NaN or Inf in its rotation; it cannot be merged")
        if isinstance(self.base_layer, BaseTunerLayer):
            self.base_layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for name in reversed(names):  # x meets the first gate first: W' = W @ R_last @ ... @ R_first
            self._turn_weight(name, undo=False)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge` within one rounding of the weight's dtype."""
        while self.merged_adapters:
            self._turn_weight(self.merged_adapters.pop(), undo=True)
        if isinstance(self.base_layer, BaseTunerLayer):
            self.base_layer.unmerge()

    def _turn_weight(self, adapter_name: str, *, undo: bool) -> None:
        if (gate := self.gate(adapter_name)) is not None:
            linear = self.get_base_layer()
            linear.weight.data = gate.fold().apply(linear.weight.data, undo=undo)


class SO8TModel(BaseTuner):
    """The tuner. PEFT's LoraModel makes the LoRA inside, so that quantised bases keep working."""

    prefix: str = PREFIX
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (BaseTuner's contract)
    _create_new_module = staticmethod(LoraModel._create_new_module)

    def _prepare_adapter_config(self, peft_config: SO8TConfig, model_config: dict[str, Any]) -> SO8TConfig:
        return peft_config

    def _prepare_model(self, peft_config: SO8TConfig, model: nn.Module) -> None:
        """Check every choice before any layer is replaced: a refused model stays as it was."""
        modules = dict(model.named_modules())
        targets = {name: layer_of(name) for name in target_names(model, peft_config.targets)}
        layers = resolve_layers(peft_config.layers, 1 + max(map(layer_of, modules)))
        without = sorted(layers - set(targets.values()))
        if peft_config.layers is not None and without:
            targeted = [peft_config.targets] if isinstance(peft_config.targets, str) else peft_config.targets
            wanted = " or ".join(f"`{name}`" for name in targeted)
            raise InputError(f"layer {without[0]} has no {wanted} to rotate; leave it out of `layers`")
        for name, layer in targets.items():
            module = modules[name]
            if isinstance(module, BaseTunerLayer) and not isinstance(module, SO8TLinear):
                raise InputError(
                    f"{name} already carries an adapter: the rotation must feed both of its paths. "
                    "Give the LoRA to SO8TConfig(lora={...}) instead of adding it separately"
                )
            width = getattr(module, "in_features", None)
            if not isinstance(width, int):
                raise InputError(
                    f"{name} is a {type(module).__name__}, not a linear layer: SO8T cannot rotate its input"
                )
            if width % BLOCK and layer in layers:
                raise InputError(f"{name} has {width} input features, not a multiple of {BLOCK}: SO8T cannot rotate it")
        if peft_config.lora_config is not None:
            _check_lora_targets(peft_config.lora_config, model, modules)
        _keep_unpacked(modules)
        rotated = [name for name, layer in targets.items() if layer in layers]
        if peft_config.shared is None:
            several = len(rotated) > len({layer_of(name) for name in rotated})  # one target a layer shares nothing
            peft_config.shared = shared_inputs(model, rotated) if peft_config.share and several else {}
        first_of = {other: first for first, others in peft_config.shared.items() for other in others}
        if unknown := sorted({*first_of, *first_of.values()} - set(rotated)):
            raise InputError(f"`shared` names {unknown[0]}, which is no target of this model: made for another model?")
        self.so8t_targets, self.so8t_rotated, self.so8t_first_of = set(targets), set(rotated), first_of
        peft_config.name_modules(sorted({name.rpartition(".")[2] for name in targets}))

    def _check_target_module_exists(self, peft_config: SO8TConfig, key: str) -> bool:
        lora = peft_config.lora_config
        return key in self.so8t_targets or bool(lora is not None and check_target_module_exists(lora, key))

    def _create_and_replace(
        self,
        config: SO8TConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if current_key in self.so8t_targets:
            if not isinstance(target, SO8TLinear):
                wrapper = SO8TLinear(target, adapter_name)
                self._replace_module(parent, target_name, wrapper, target)
                target = wrapper
            if current_key in self.so8t_first_of:
                first: Any = self.model.get_submodule(self.so8t_first_of[current_key])
                target.follow(adapter_name, first.gate(adapter_name))  # replaced already: it comes first in the model
            elif current_key in self.so8t_rotated:
                options = {"scale": config.scale, "shuffle": config.shuffle, "accumulate": config.accumulate}
                target.add_gate(adapter_name, init_scale=config.init_scale, layer=current_key, **options)
            parent, target_name, target = target, "base_layer", target.base_layer
        lora = config.lora_config
        if lora is not None and check_target_module_exists(lora, current_key):
            LoraModel._create_and_replace(self, lora, adapter_name, target, target_name, parent, current_key)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        # Needed for every adapter: PEFT calls its hook after an injection for the first adapter only.
        refresh_together(model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        super()._replace_module(parent, child_name, new_module, child)
        if isinstance(new_module, SO8TLinear):
            new_module.guard = parent.register_forward_pre_hook(_refuse_outer_adapter)
        elif isinstance(child, SO8TLinear):
            refresh_apart(self.model)
            if child.guard is not None:
                child.guard.remove()


def _keep_unpacked(modules: dict[str, Any]) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU's bfloat16 unit.

    bitsandbytes 0.50 repacks them in the first forward in evaluation mode and never undoes it. From then on the
    layer's backward and its dequantised weight are garbage: training after an evaluation would learn nothing.
    """
    for name, module in modules.items():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise InputError(
                    f"{name}: bitsandbytes has repacked the 4-bit weights in an evaluation on this CPU, and gradients "
                    "through them would be wrong; load the model again and attach before it is run"
                )
            module.support_avx512bf16_for_cpu = False


def _refuse_outer_adapter(parent: nn.Module, args: Any) -> None:
    """Refuse an adapter that is wrapped around a target afterwards: it would see x unrotated, a different function."""
    for name, child in parent.named_children():
        inner = getattr(child, "base_layer", None)
        if isinstance(inner, SO8TLinear) and not isinstance(child, SO8TLinear):
            raise InputError(
                f"{name}: another adapter was wrapped around the rotation and would bypass it. "
                "Give the LoRA to SO8TConfig(lora={...}) and attach once"
            )


def resolve_layers(layers: list[int] | None, count: int) -> set[int]:
    """Chosen decoder layers as non-negative indices; None = all of `count`.

    Raises:
        InputError: (a ValueError) an index out of range (the message gives the number of layers), or an empty choice.
    """
    if layers is None:
        return set(range(count))
    for layer in layers:
        if not -count <= layer < count:
            raise InputError(
                f"layer {layer} is out of range: the model has {count} layers (0 to {count - 1}, or -{count} to -1)"
            )
    if not layers:
        raise InputError("layers is empty: nothing would be rotated; give indices, or null for all layers")
    return {layer % count for layer in layers}


def layer_of(key: str) -> int:
    """The index of the decoder layer that holds a module or tensor, by its name; -1 outside of the layers."""
    found = _LAYER.search(key)
    return int(found.group(1)) if found else -1


def target_names(model: nn.Module, targets: list[str] | str) -> list[str]:
    """Names of the modules inside decoder layers whose input is to be rotated, in the model's order.

    "all-linear" means every linear layer except those that choose experts.

    Raises:
        InputError: one of `targets` matches no module, or the decoder layers have no linear layer.
    """
    inside = [
        (name, module)
        for name, module in model.named_modules()
        if layer_of(name) >= 0 and ".base_layer" not in name and f".{PREFIX}" not in name
    ]
    linear = [name for name, module in inside if isinstance(module, nn.Linear | BaseTunerLayer)]
    if targets == ALL_LINEAR:
        if not linear:
            raise InputError(f"no decoder layer of {type(model).__name__} has a linear layer to rotate")
        return [name for name in linear if name.rpartition(".")[2] not in ROUTERS]
    found = {name for name, _ in inside if f".{name}".endswith(tuple(f".{target}" for target in targets))}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            own = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(
                f"no decoder layer of {type(model).__name__} has a `{target}`; its linear layers are {', '.join(own)}"
            )
    return [name for name, _ in inside if name in found]


def _check_lora_targets(lora: LoraConfig, model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Check that every LoRA target matches a layer that the bake can fold; PEFT checks only that one target matches."""
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    for target in sorted(lora.target_modules):
        matches = [n for n in modules if f".{n}".endswith(f".{target}") and check_target_module_exists(lora, n)]
        if not matches:
            own = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear) and ".lora_" not in n}
            where = "" if lora.layers_to_transform is None else f" in layers_to_transform={lora.layers_to_transform}"
            raise InputError(
                f"lora target {target} matches no layer{where}; the model's linear layers are {', '.join(sorted(own))}"
            )
        for name in matches:
            module = modules[name]
            if not hasattr(module, "in_features"):
                raise InputError(f"lora target {name} is a {type(module).__name__}; only linear layers can be baked")
            if embedding is not None and getattr(module, "weight", None) is embedding.weight:
                raise InputError(f"lora target {name} shares its weight with the embedding; a bake would change both")


def gates(model: nn.Module) -> dict[str, RotationGate]:
    """Active gates by the name of the layer they rotate, e.g. "model.layers.0.self_attn.o_proj".

    A gate that several layers share stands once, under the first of them.
    """
    found = {}
    for name, module in model.named_modules():
        for adapter in module.active_adapters if isinstance(module, SO8TLinear) else ():
            if adapter in module.lora_so8t:
                found[name.removeprefix("base_model.model.")] = module.lora_so8t[adapter]
    return found


def trainable_counts(model: nn.Module) -> tuple[int, int]:
    """(all trainable parameters, those of the rotations)."""
    whole, rotations = model.parameters(), (p for gate in gates(model).values() for p in gate.parameters())
    return sum(p.numel() for p in whole if p.requires_grad), sum(p.numel() for p in rotations if p.requires_grad)


def restart(model: nn.Module) -> None:
    """Move each active adapter's rotations into its products of earlier rotations; theta starts anew at zero.

    The function stays as it was, within the rounding of theta's dtype. The optimiser's state belongs to the old theta.

    Raises:
        InputError: an adapter without `accumulate=True`, or a theta with a NaN, an Inf or an absurd angle.
    """
    found = gates(model).values()
    if not found or any(gate.accumulated is None for gate in found):
        raise InputError("the adapter keeps no product of earlier rotations; attach SO8TConfig(accumulate=True)")
    for gate in found:
        gate.restart()


def orthogonality_loss(model: nn.Module) -> Tensor:
    """Mean over all gates of ||R^T R - I||_F^2 per block: rounding noise for exp; an optional term in training.

    Raises:
        InputError: the model has no gate.
    """
    terms = []
    for part in (part for gate in gates(model).values() for part in gate.parts()):
        R = part.rotation()
        terms.append((R.mT @ R - torch.eye(R.shape[-1], device=R.device)).square().sum((-2, -1)).mean())
    if not terms:
        raise InputError("the model has no rotation gate; attach an adapter first")
    return torch.stack(terms).mean()


if PeftType[METHOD] not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="so8t", config_cls=SO8TConfig, model_cls=SO8TModel, prefix=PREFIX)
