"""What training relies on: the same gradients however a step is cut, one exponential a step, little memory kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_models import IDS, LORA, randomise, tiny_llama
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from so8t_core import InputError, SO8TConfig, attach, exponential, gates
from so8t_core.gate import RotationGate, refresh


def adapted(**changes: object) -> nn.Module:
    return randomise(attach(tiny_llama(**changes), SO8TConfig(lora=LORA)))


def gradients(model: nn.Module, *batches: Tensor, forward: Callable[..., nn.Module] | None = None) -> dict[str, Tensor]:
    """Gradients after the batches' backward passes."""
    model.zero_grad()
    for ids in batches:
        (model if forward is None else forward)(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_accumulated_gradients_are_the_sum_of_the_separate_ones():
    model = adapted()
    parts = [gradients(copy.deepcopy(model), ids[None]) for ids in IDS]
    assert same(
        gradients(model, *(ids[None] for ids in IDS)), {name: parts[0][name] + parts[1][name] for name in parts[0]}
    )
    assert not same(parts[0], parts[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant):
    model = adapted()
    model.train()
    want = gradients(model, IDS)
    model.enable_input_require_grads()  # reentrant checkpoints need an input with a gradient
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    entered = []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: entered.append(torch.is_grad_enabled()))
    assert same(gradients(model, IDS), want)
    assert len(entered) == 2  # it did run again in the backward


def test_checkpointing_and_accumulation_together_change_no_gradient():
    model = adapted()
    model.train()
    want = gradients(model, *(ids[None] for ids in IDS))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert same(gradients(model, *(ids[None] for ids in IDS)), want)


def test_a_compiled_model_has_the_same_gradients():
    model = adapted(num_hidden_layers=1)
    want = gradients(model, IDS)
    torch._dynamo.reset()
    found = gradients(model, IDS, forward=torch.compile(model, backend="aot_eager"))
    for name, grad in want.items():  # the compiler may sum in another order
        assert (found[name] - grad).abs().max() <= 64 * torch.finfo(torch.float32).eps * grad.abs().max(), name
    with torch.no_grad():
        for gate in gates(model).values():
            gate.theta.mul_(1.5)  # as an optimiser does: a compiled step must see it
    found = gradients(model, IDS, forward=torch.compile(model, backend="aot_eager"))
    again = gradients(model, IDS)
    assert not same(again, want)
    for name, grad in again.items():
        assert (found[name] - grad).abs().max() <= 64 * torch.finfo(torch.float32).eps * grad.abs().max(), name


def test_a_model_compiled_into_the_same_operations_has_the_same_bits():
    model = adapted(num_hidden_layers=1)
    want = gradients(model, IDS)
    torch._dynamo.reset()
    assert same(gradients(model, IDS, forward=torch.compile(model, backend="eager")), want)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks of every batch that is exponentiated from now on."""
    calls: list[int] = []
    original = exponential._exponential
    monkeypatch.setattr(
        exponential, "_exponential", lambda theta, *rest: calls.append(len(theta)) or original(theta, *rest)
    )
    return calls


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_all_layers_are_exponentiated_once_an_optimiser_step(kind, monkeypatch):
    model = adapted()
    optimiser = kind([p for p in model.parameters() if p.requires_grad], lr=0.01)
    calls = counted(monkeypatch)
    for _ in range(3):
        gradients(model, IDS[:1], IDS[1:], IDS)
        with torch.no_grad():
            model(input_ids=IDS)
        optimiser.step()
    assert calls == [3 * 4] * 3  # three layers of four blocks, whatever the micro-batches, evaluation included


def pulled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks of every batch whose gradient is taken from now on."""
    calls: list[int] = []
    original = exponential._pull_back
    monkeypatch.setattr(
        exponential, "_pull_back", lambda w, grad, *rest: calls.append(len(grad)) or original(w, grad, *rest)
    )
    return calls


def test_all_layers_go_backward_in_one_batch_and_run_again_each_by_itself(monkeypatch):
    model = adapted()
    model.train()
    calls = pulled(monkeypatch)
    gradients(model, IDS[:1], IDS[1:])
    assert calls == [3 * 4] * 2  # one for each micro-batch
    model.enable_input_require_grads()
    for reentrant, want in ((False, [3 * 4]), (True, [4] * 3)):  # reentrant: a backward of its own for each layer
        calls.clear()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        gradients(model, IDS)
        assert calls == want


def test_a_theta_is_told_of_its_gradient_once_a_backward():
    """DistributedDataParallel counts: a second call, even without a gradient, is an error there."""
    model = adapted()
    model.train()
    model.enable_input_require_grads()
    told: list[str] = []
    nodes = [gate.theta.expand_as(gate.theta).grad_fn.next_functions[0][0] for gate in gates(model).values()]
    for name, node in zip(gates(model), nodes, strict=True):
        node.register_hook(lambda *_, name=name: told.append(name))
    for reentrant in (False, True):
        told.clear()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        gradients(model, IDS)
        assert sorted(told) == sorted(gates(model))


def test_a_lone_forward_of_the_inner_model_is_right_as_well(monkeypatch):
    model = adapted()
    calls = counted(monkeypatch)
    hidden = model.model(input_ids=IDS).last_hidden_state  # passes by the model's hook
    assert calls == [4] * 3
    assert torch.equal(model.lm_head(hidden), model(input_ids=IDS).logits)


def test_a_sharded_theta_is_left_to_its_layer(monkeypatch):
    model = adapted()
    calls = counted(monkeypatch)
    first = next(iter(gates(model).values()))
    monkeypatch.setattr(first, "is_whole", lambda: False)
    model(input_ids=IDS)
    assert calls == [8, 4]


def test_every_optimiser_step_is_noticed_where_values_are_not_compared():
    """Off the CPU a stamp decides; some optimisers' kernels write without raising a version."""

    class Silent(torch.optim.Optimizer):
        def step(self, closure: object = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.detach().numpy()[:] += 1

    gate = RotationGate(16)
    before, version = gate._stamp(), gate.theta._version
    Silent(gate.parameters(), {}).step()
    assert gate.theta._version == version
    assert gate._stamp() != before
    before = gate._stamp()
    with torch.no_grad():
        gate.theta.mul_(2)
    assert gate._stamp() != before


class Waits(TorchDispatchMode):
    """Collects operations after which the host must wait for a device: a value or a size goes to it."""

    NAMES = frozenset({"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen += [name] if name in self.NAMES else []
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_its_device_once_and_not_inside(monkeypatch):
    """Shown on a CPU, with the gates made to tell a new theta as they do elsewhere: by its stamp."""
    found = list(gates(adapted()).values())
    x = torch.randn(2, 5, 32, requires_grad=True)
    lists: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: lists.append(self.numel()) or tolist(self))
    with Waits() as beginning:
        refresh(found)
    assert (beginning.seen, lists) == ([], [3])  # the lengths of all three layers' thetas at once
    lists.clear()
    for gate in found:
        gate._known = gate._known._replace(was=gate._stamp())

    def micro_batch() -> None:
        y = x
        for gate in found:
            y = gate(y)
        y[..., 0].sum().backward()

    with Waits() as inside:
        micro_batch()
        micro_batch()
    assert (inside.seen, lists) == ([], [])
    found[0]._known = found[0]._known._replace(was=found[0].theta.detach().clone())
    with Waits() as comparing:  # as on a CPU: it would show
        micro_batch()
    assert comparing.seen == ["equal"]


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of all different storages that the graph of `run` keeps, parameters not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


def test_the_rotation_keeps_its_input_and_no_wider_copy():
    tokens, width = 512, 256
    gate = RotationGate(width, init_scale=0.1)
    x = torch.randn(1, tokens, width).bfloat16().requires_grad_()
    R_bytes = width * 8 * 4
    assert saved_bytes(lambda: gate(x * 1.0)) - R_bytes - saved_bytes(lambda: x * 1.0) == 2 * tokens * width
    wide = saved_bytes(lambda: (x * 1.0).float() @ torch.eye(width, requires_grad=True))  # a float32 copy would show
    assert wide >= 4 * tokens * width


def test_a_training_step_keeps_next_to_nothing_more_than_the_frozen_base():
    base = tiny_llama(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4).bfloat16()
    base.requires_grad_(False)
    base.enable_input_require_grads()
    ids = torch.randint(0, 64, (1, 512), generator=torch.Generator().manual_seed(0))
    plain = saved_bytes(lambda: base(input_ids=ids).logits)
    model = attach(base, SO8TConfig(init_scale=0.1))
    model(input_ids=ids)
    extra = saved_bytes(lambda: model(input_ids=ids).logits) - plain
    # The input is the attention's output, which attention keeps anyway: measured 0.06, the rotations themselves.
    assert 0 < extra / (512 * 256 * 3) <= 0.1


def test_an_adapter_added_later_is_exponentiated_in_one_batch_and_unused_ones_not_at_all(monkeypatch):
    model = get_peft_model(tiny_llama(), SO8TConfig(init_scale=0.1))
    model.add_adapter("later", SO8TConfig(init_scale=0.1))
    calls = counted(monkeypatch)
    model(input_ids=IDS)
    model.set_adapter("later")
    model(input_ids=IDS)
    assert calls == [3 * 4] * 2
    with torch.no_grad():
        for gate in gates(model).values():
            gate.theta.fill_(torch.nan)  # an error if it were looked at
    with model.disable_adapter():
        model(input_ids=IDS)
    model.set_adapter("default")
    model(input_ids=IDS)
    model.set_adapter("later")
    with pytest.raises(InputError, match="NaN"):
        model(input_ids=IDS)
    assert calls == [3 * 4] * 2
