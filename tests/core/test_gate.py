"""RotationGate: keeps its precision, and never serves a stale rotation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from so8t_core import RotationGate, exp_so8, rotate_blocks, rotate_weight


def gate_of(angle: float = 0.3) -> RotationGate:
    torch.manual_seed(0)
    return RotationGate(24, init_scale=angle)


@pytest.mark.parametrize(
    "cast", ["half", "bfloat16", "float", lambda m: m.to(torch.bfloat16), lambda m: m.double().half()]
)
def test_a_cast_of_the_model_leaves_theta_exact_in_float32(cast):
    model = nn.Sequential(gate_of(), nn.Linear(24, 24))
    before = model[0].theta.detach().clone()
    getattr(model, cast)() if isinstance(cast, str) else cast(model)
    assert model[0].theta.dtype == torch.float32
    assert torch.equal(model[0].theta, before)
    assert not torch.equal(before.bfloat16().float(), before)  # the cast would have shown


def test_double_keeps_double():
    assert gate_of().double().theta.dtype == torch.float64


def changes() -> dict[str, object]:
    def step(gate: RotationGate) -> None:
        optimiser = torch.optim.SGD(gate.parameters(), lr=1.0)
        gate(torch.randn(3, 24)).square().sum().add(gate.theta.sum()).backward()
        optimiser.step()

    def in_place(gate: RotationGate) -> None:
        with torch.no_grad():
            gate.theta.mul_(2)

    def data(gate: RotationGate) -> None:
        gate.theta.data.mul_(2)

    def numpy_alias(gate: RotationGate) -> None:
        gate.theta.detach().numpy()[:] *= 2  # raises no version, as some optimisers' kernels do

    def load(gate: RotationGate) -> None:
        gate.load_state_dict({"theta": gate.theta.detach() * 2})

    def assign(gate: RotationGate) -> None:
        gate.load_state_dict({"theta": gate.theta.detach() * 2}, assign=True)

    def replace(gate: RotationGate) -> None:
        gate.theta = nn.Parameter(gate.theta.detach() * 2)

    return {f.__name__: f for f in (step, in_place, data, numpy_alias, load, assign, replace)}


@pytest.mark.parametrize("change", changes().values(), ids=changes().keys())
def test_the_cache_follows_theta(change):
    gate, xs = gate_of(), [torch.randn(3, 24).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    with torch.no_grad():
        before, turned = gate.rotation(), [gate(x) for x in xs]
        assert gate.rotation() is before  # it is cached
    change(gate)
    with torch.no_grad():
        assert torch.equal(gate.rotation(), exp_so8(gate.theta))
        assert not torch.equal(gate.rotation(), before)
        for x, y in zip(xs, turned, strict=True):
            assert torch.equal(gate(x), rotate_blocks(x, exp_so8(gate.theta)))
            assert not torch.equal(gate(x), y)


def test_a_copy_has_its_own_cache():
    gate = gate_of()
    with torch.no_grad():
        gate.rotation()
        other = copy.deepcopy(gate)
        other.theta.zero_()
        assert torch.equal(other.rotation(), torch.eye(8).expand(3, 8, 8))


def test_a_rotation_cached_in_inference_mode_serves_a_later_backward():
    gate = gate_of().requires_grad_(False)
    with torch.inference_mode():
        gate(torch.randn(3, 24))
    x = torch.randn(3, 24, requires_grad=True)
    gate(x).sum().backward()
    assert x.grad is not None


def test_a_rotation_cached_while_theta_was_frozen_serves_its_training_later():
    gate, x = gate_of().requires_grad_(False), torch.randn(3, 24)
    gate(x)
    gate.requires_grad_(True)
    gate(x)[:, 0].sum().backward()
    assert gate.theta.grad.abs().max() > 0


def test_a_new_parameter_of_the_same_values_gets_the_gradient():
    """The rotation is known, but its graph leads to the parameter that was there."""
    gate, x = gate_of(), torch.randn(3, 24)
    gate(x)
    old, gate.theta = gate.theta, nn.Parameter(gate.theta.detach().clone())
    gate(x)[:, 0].sum().backward()
    assert gate.theta.grad.abs().max() > 0
    assert old.grad is None


def test_a_theta_that_is_elsewhere_or_in_parts_is_not_whole():
    gate = gate_of()
    assert gate.is_whole()
    gate.theta.data = gate.theta.data[:1]
    assert not gate.is_whole()
    assert not gate_of().to("meta").is_whole()


def test_training_has_a_graph_and_evaluation_has_none():
    gate = gate_of()
    assert gate.rotation().requires_grad
    with torch.no_grad():
        assert not gate.rotation().requires_grad


def test_zero_theta_is_exactly_the_identity():
    x = torch.randn(5, 24)
    assert torch.equal(RotationGate(24)(x), x)


def test_baking_the_weight_commutes_with_the_rotation_and_its_wrong_variants_do_not():
    gate, W, x = gate_of().double(), torch.randn(16, 24, dtype=torch.float64), torch.randn(9, 24, dtype=torch.float64)
    with torch.no_grad():
        want = gate(x) @ W.T
    assert (x @ rotate_weight(W, gate.theta).T - want).abs().max() < 24 * 8 * torch.finfo(torch.float64).eps
    for wrong in (rotate_weight(W, -gate.theta), W):
        assert (x @ wrong.T - want).abs().max() > 0.1


@pytest.mark.parametrize("features", [0, 12, -8])
def test_a_width_that_is_no_multiple_of_8_is_refused_by_the_layers_name(features):
    with pytest.raises(
        ValueError, match=f"layers.5.o_proj: {features} input features are not a positive multiple of 8"
    ):
        RotationGate(features, layer="layers.5.o_proj")


def test_theta_that_is_no_number_names_the_layer():
    gate = RotationGate(16, layer="model.layers.3.self_attn.o_proj")
    gate.theta.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.3\.self_attn\.o_proj: theta has a NaN or Inf"):
        gate(torch.zeros(1, 16))


def test_a_coarser_theta_is_used_as_it_is():
    """`assign=True`, which PEFT's low_cpu_mem_usage uses, takes the file's dtype."""
    gate = gate_of()
    gate(torch.randn(3, 24))
    gate.load_state_dict({"theta": gate.theta.detach().bfloat16()}, assign=True)
    gate(torch.randn(3, 24)).square().sum().add(gate.theta.sum()).backward()
    assert gate.theta.grad.dtype == gate.theta.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(gate.rotation(), exp_so8(gate.theta.float()))


def test_a_finer_theta_of_the_same_values_is_another_one():
    gate = gate_of()
    assert gate.rotation().dtype == torch.float32
    gate.load_state_dict({"theta": gate.theta.detach().double()}, assign=True)
    assert gate.rotation().dtype == torch.float64


def test_a_pickled_gate_carries_theta_and_not_what_is_known_of_it():
    gate = RotationGate(512, init_scale=0.1)
    before = len(pickle.dumps(gate))
    want = gate(torch.ones(3, 512)).detach()
    assert len(pickle.dumps(gate)) <= before + 64
    for again in (pickle.loads(pickle.dumps(gate)), copy.deepcopy(gate)):
        assert again._known is None
        assert torch.equal(again(torch.ones(3, 512)), want)


def test_autocast_does_not_coarsen_the_cached_rotation():
    gate = gate_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        R = gate.rotation()
    assert torch.equal(R, exp_so8(gate.theta))
