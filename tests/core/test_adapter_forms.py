"""Every form of the rotation: any linear input, shared inputs, scale, shuffle, restarts; each folds exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from core_models import IDS, LORA, gap, logits, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_architectures import TYPES, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from so8t_core import (
    InputError,
    RotationGate,
    SO8TConfig,
    attach,
    bake,
    bake_checkpoint,
    detach,
    exp_so8,
    export_oft,
    gates,
    import_oft,
    load_adapter,
    plane_angles,
    restart,
    save_adapter,
    trainable_counts,
    unbake,
)
from so8t_core.gate import distant_channels
from so8t_core.store import config_of

FORMS = {
    "one other input": SO8TConfig(targets=["down_proj"]),
    "q, k and v": SO8TConfig(targets=["q_proj", "k_proj", "v_proj"]),
    "each its own": SO8TConfig(targets="all-linear", share=False),
    "all shared": SO8TConfig(targets="all-linear"),
    "scaled blocks": SO8TConfig(scale="block"),
    "scaled channels": SO8TConfig(targets=["q_proj", "k_proj", "v_proj"], scale="channel"),
    "shuffled": SO8TConfig(shuffle=True),
    "restarted": SO8TConfig(accumulate=True),
    "everything": SO8TConfig(targets="all-linear", scale="channel", shuffle=True, accumulate=True, lora=LORA),
}
WHOLE = FORMS["everything"]


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request: pytest.FixtureRequest) -> SO8TConfig:
    return copy.deepcopy(request.param)


def moved(model: nn.Module, *, seed: int = 1) -> nn.Module:
    """Every parameter of the adapter away from its start, and a restart between two such moves where it has one."""
    generator = torch.Generator().manual_seed(seed)
    for again in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(std=0.2, generator=generator)
        if again == 0 and any(gate.accumulated is not None for gate in gates(model).values()):
            restart(model)
    return model


def bound(want: torch.Tensor) -> float:
    """c eps sqrt(K) of the logits' size with c = 16, as in test_architectures."""
    return 16 * 48**0.5 * torch.finfo(torch.float32).eps * max(want.abs().max().item(), 1.0)


def test_every_form_starts_at_the_base(form: SO8TConfig) -> None:
    assert torch.equal(logits(attach(tiny_llama(), form)), logits(tiny_llama()))


def test_every_form_survives_file_bake_and_unbake(form: SO8TConfig, tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = moved(attach(copy.deepcopy(base), form))
    want = logits(model)
    assert gap(want, logits(base)) > 1000 * bound(want)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path / "adapter")), want)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()), want)
    baked = bake(load_adapter(tiny_llama(), tmp_path / "adapter"))
    assert gap(logits(baked), want) < bound(want)
    out = bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    files, memory = load_file(out / "model.safetensors"), baked.state_dict()
    assert all(torch.equal(files[name], memory[name]) for name in files)  # one rounding, whichever way
    wrong = bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "wrong", invert=True)
    assert gap(logits(AutoModelForCausalLM.from_pretrained(wrong).eval()), want) > 1000 * bound(want)
    back = unbake(baked, tmp_path / "adapter").state_dict()
    for name, weight in tiny_llama().state_dict().items():
        # one rounding of W' seen through the way back, (|W| + |s B A|) eps with scales of exp(0.2 z), and its own
        assert gap(back[name], weight) < 16 * torch.finfo(torch.float32).eps * (1 + weight.abs().max().item()), name


def test_every_form_merges_and_unmerges(form: SO8TConfig) -> None:
    model = moved(get_peft_model(tiny_llama(), form).eval())
    want = logits(model)
    assert gap(want, logits(tiny_llama())) > 1000 * bound(want)
    model.merge_adapter()
    assert gap(logits(model), want) < bound(want)
    model.unmerge_adapter()
    assert gap(logits(model), want) < bound(want)
    with model.disable_adapter():
        assert gap(logits(model), logits(tiny_llama())) < bound(want)
    merged = model.merge_and_unload()
    assert gap(logits(merged), want) < bound(want)


def test_the_formula_of_everything() -> None:
    """W' = (W + s B A) P^T R2 P R_acc exp(A) diag(exp(c)), written out with dense matrices."""
    model = moved(attach(tiny_llama(), SO8TConfig(scale="channel", shuffle=True, accumulate=True, lora=LORA))).double()
    layer = model.model.layers[1].self_attn.o_proj
    gate = gates(model)["model.layers.1.self_attn.o_proj"]
    P = torch.eye(32, dtype=torch.float64)[distant_channels(4)]  # (P x)[i] = x[order[i]]
    assert torch.equal(P @ torch.arange(32.0).double(), gate.permutation.double())
    R1, R2 = (torch.block_diag(*(part.accumulated @ exp_so8(part.theta))) for part in gate.parts())
    lora = layer.base_layer
    W = layer.weight + LORA["lora_alpha"] / LORA["r"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    s = torch.diag(gate.log_scale.exp())
    x = torch.randn(5, 32, dtype=torch.float64)
    y = layer(x)
    assert gap(y, x @ (W @ P.T @ R2 @ P @ R1 @ s).T) < 1e-12
    assert gap(gate.fold().apply(W), W @ P.T @ R2 @ P @ R1 @ s) < 1e-12
    for wrong in (W @ s @ P.T @ R2 @ P @ R1, W @ P @ R2 @ P.T @ R1 @ s, W @ R1 @ P.T @ R2 @ P @ s, W @ R2 @ P @ R1 @ s):
        assert gap(y, x @ wrong.T) > 0.1


@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture_with_every_option(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type, 2)
    model.save_pretrained(tmp_path / "base")
    moved(attach(model, SO8TConfig(targets="all-linear", scale="channel", shuffle=True)))
    groups = config_of(model).shared
    fused = model_type == "phi3"
    assert {len(others) for others in groups.values()} == (set() if fused else {1, 2})
    assert len(gates(model)) == 2 * 4  # inputs a layer: attention, o_proj, MLP, down_proj
    want = logits(model)
    save_adapter(model, tmp_path / "adapter")
    out = bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    assert gap(logits(plain), want) < bound(want)
    assert gap(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()), want) > 1000 * bound(want)


def test_a_shared_rotation_is_one_set_of_parameters_and_one_application(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny_llama(), SO8TConfig(targets="all-linear"))
    assert trainable_counts(model) == (3 * 28 * (4 + 4 + 4 + 6),) * 2  # 32 wide three times, 48 once
    turned = []
    turn = RotationGate._turn
    monkeypatch.setattr(RotationGate, "_turn", lambda gate, x: turned.append(gate) or turn(gate, x))
    logits(model)
    assert len(turned) == len(gates(model)) == 3 * 4
    assert all(gate._applied is None for gate in gates(model).values())  # nothing is kept once all have read


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_one_application_has_the_gradient_of_many(checkpointing: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under checkpointing as well, where a layer runs again inside the backward."""

    def gradients(*, apart: bool) -> list[torch.Tensor]:
        model = moved(attach(tiny_llama(), SO8TConfig(targets="all-linear", scale="block", shuffle=True)))
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if apart:
            monkeypatch.setattr(RotationGate, "forward", lambda gate, x, reader=None: gate._turn(x))
        for _ in range(2):  # twice: nothing of the first pass may serve the second
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
        monkeypatch.undo()
        return [p.grad for p in model.parameters() if p.requires_grad]

    together, apart = gradients(apart=False), gradients(apart=True)
    assert len(together) == len(apart) == 3 * 4 * 3
    for one, other in zip(together, apart, strict=True):
        assert one.abs().max() > 0
        assert gap(one, other) <= 1e-5 * max(1.0, other.abs().max().item())  # other sums of the same terms


def test_what_was_handed_over_is_never_stale() -> None:
    model = moved(attach(tiny_llama(), SO8TConfig(targets=["q_proj", "k_proj", "v_proj"], scale="channel")))
    q, k = (getattr(model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
    gate = q.gate("default")
    x = torch.randn(3, 32)

    def exact(layer: nn.Module) -> torch.Tensor:
        return layer.base_layer(gate._turn(x))

    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: gate.theta.mul_(2),
            lambda: gate.log_scale.add_(0.5),
            lambda: x.mul_(3),
            lambda: gate.load_state_dict({"theta": gate.theta * 0.5, "log_scale": gate.log_scale}),
        ):
            q(x)
            change()
            assert torch.equal(k(x), exact(k))
            assert torch.equal(q(x.clone()), exact(q))
    q(x)
    assert k(x).requires_grad  # after a forward without gradients
    copied = copy.deepcopy(model)
    with torch.no_grad():
        gate.theta.zero_()
    assert gap(logits(copied), logits(model)) > 1e-2  # the copy follows its own gate


def test_only_readers_of_the_same_tensor_share() -> None:
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    plain = attention.k_proj.forward
    attention.k_proj.forward = lambda x: plain(x)
    attention.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    norm = nn.Identity()
    attention.v_proj = nn.Sequential(norm, attention.v_proj)  # v reads the tensor through a module, still the same one
    attach(model, SO8TConfig(layers=[1], targets=["q_proj", "k_proj", "v_proj.1"]))
    root = "model.layers.1.self_attn"
    assert config_of(model).shared == {f"{root}.q_proj": [f"{root}.k_proj", f"{root}.v_proj.1"]}

    class Copy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    other = tiny_llama()
    other.model.layers[1].self_attn.v_proj = nn.Sequential(Copy(), other.model.layers[1].self_attn.v_proj)
    attach(other, SO8TConfig(layers=[1], targets=["q_proj", "k_proj", "v_proj.1"]))
    assert config_of(other).shared == {f"{root}.q_proj": [f"{root}.k_proj"]}
    assert len(gates(other)) == 2


def test_a_router_reads_the_tensor_as_it_was() -> None:
    """`all-linear` leaves out what chooses experts, and the experts' own input is turned inside their layers."""
    model = tiny("qwen3_next", 2)
    attach(model, SO8TConfig(targets="all-linear"))
    turned = {name.rpartition(".")[2] for name in config_of(model).target_modules}
    assert "shared_expert_gate" not in turned
    assert {"gate_proj", "up_proj", "down_proj"} <= turned
    model.config.use_cache = False  # two layers of linear attention have no length to ask a cache for
    moved(model)
    want = logits(model)
    assert gap(logits(bake(model)), want) < bound(want)


def test_the_probe_leaves_no_trace() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    attach(model, SO8TConfig(targets="all-linear"))
    assert model.training
    assert model.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), state)
    plain = detach(model)
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_the_meta_device_finds_the_same_groups() -> None:
    real = attach(tiny_llama(), SO8TConfig(targets="all-linear"))
    with torch.device("meta"):
        empty = attach(tiny_llama(), SO8TConfig(targets="all-linear"))
    assert config_of(empty).shared == config_of(real).shared != {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": []}, r"targets must be names of linear layers, .*got \[\]"),
        ({"targets": [3]}, r"got \[3\]"),
        ({"targets": "all-linear", "scale": "row"}, "scale must be one of none, block, channel; got 'row'"),
        ({"format_version": 3}, "format_version is 3, this SO8T reads 1 to 2"),
    ],
)
def test_a_form_that_does_not_exist_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SO8TConfig(**fields)


def test_a_target_that_matches_nothing_is_refused_among_others_that_do() -> None:
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM has a `qkv_proj`; its linear layers are down_proj, .*v_proj"
    ):
        attach(tiny_llama(), SO8TConfig(targets=["o_proj", "qkv_proj"]))


def edited(directory: Path, change: object) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, directory / "adapter_model.safetensors")


def without(ending: str):
    return lambda tensors: tensors.pop(next(key for key in tensors if key.endswith(ending)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lora_so8t.log_scale"), "misses .*log_scale"),
        (without("lora_so8t.accumulated"), "misses .*accumulated"),
        (without("shuffled_theta"), "misses .*shuffled_theta"),
        (lambda t: next(v for k, v in t.items() if k.endswith("permutation")).fill_(1), "is no permutation"),
        (lambda t: next(v for k, v in t.items() if k.endswith("log_scale")).fill_(torch.inf), "NaN or Inf"),
    ],
    ids=["scale", "product", "second rotation", "no permutation", "infinite scale"],
)
def test_a_damaged_form_is_refused_by_the_bake(change: object, message: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(moved(attach(tiny_llama(), copy.deepcopy(WHOLE))), tmp_path / "adapter")
    edited(tmp_path / "adapter", change)
    with pytest.raises(InputError, match=message):
        bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(InputError):
        load_adapter(tiny_llama(), tmp_path / "adapter")


def test_a_group_that_the_model_or_the_file_lacks_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(attach(tiny_llama(), SO8TConfig(targets=["q_proj", "k_proj"])), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(path.read_text())
    first = "model.layers.0.self_attn.o_proj"
    path.write_text(json.dumps(fields | {"shared": {first: ["model.layers.0.mlp.down_proj"]}}))
    with pytest.raises(InputError, match=r"`shared` names model\.layers\.0\.mlp\.down_proj, which is no target"):
        load_adapter(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(InputError, match="o_proj should own a rotation that others share"):
        bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_restart_keeps_the_function_and_starts_the_angles_anew() -> None:
    model = attach(tiny_llama(), SO8TConfig(accumulate=True, shuffle=True))
    with torch.no_grad():
        for gate in gates(model).values():
            for part in gate.parts():
                part.theta.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    want = logits(model)
    for _ in range(3):
        restart(model)
        assert gap(logits(model), want) < bound(want)
    assert all(not part.theta.any() for gate in gates(model).values() for part in gate.parts())
    kept = gates(model.half())["model.layers.0.self_attn.o_proj"]
    assert (kept.accumulated.dtype, kept.theta.dtype) == (torch.float64, torch.float32)
    eye = torch.eye(8, dtype=torch.float64)
    assert (kept.accumulated.mT @ kept.accumulated - eye).abs().max() < 1e-14
    with pytest.raises(InputError, match="accumulate=True"):
        restart(attach(tiny_llama(), SO8TConfig()))


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_transpose_of_a_gate_is_the_transposed_rotation(accumulate: bool) -> None:
    gate = RotationGate(32, init_scale=0.5, accumulate=accumulate)
    if accumulate:
        gate.restart()
        with torch.no_grad():
            gate.theta.normal_(std=0.5)
    before = gate.rotation().detach().clone()
    gate.transpose()
    assert gap(gate.rotation().detach(), before.mT) < 1e-6
    assert gap(before.mT, before) > 0.1


def test_a_restarted_and_shared_rotation_goes_through_stock_oft(tmp_path: Path) -> None:
    model = attach(tiny_llama(), SO8TConfig(targets="all-linear", accumulate=True))
    for _ in range(2):
        with torch.no_grad():
            for seed, gate in enumerate(gates(model).values()):
                gate.theta.normal_(generator=torch.Generator().manual_seed(seed))
                gate.theta *= 1.2 / plane_angles(gate.theta).max()  # two of them stay below pi
        restart(model)
    save_adapter(model, tmp_path / "so8t")
    want = logits(model)
    export_oft(tmp_path / "so8t", tmp_path / "oft")
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "oft").eval()
    assert gap(logits(stock), want) <= 2e-6 * max(1.0, want.abs().max().item())
    import_oft(tmp_path / "oft", tmp_path / "back")
    assert gap(logits(load_adapter(tiny_llama(), tmp_path / "back")), want) <= 2e-6 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize(("fields", "what"), [({"scale": "block"}, "a scale"), ({"shuffle": True}, "a shuffle")])
def test_oft_refuses_what_it_cannot_hold(fields: dict[str, object], what: str, tmp_path: Path) -> None:
    save_adapter(attach(tiny_llama(), SO8TConfig(**fields)), tmp_path / "so8t")
    with pytest.raises(InputError, match=f"has {what}, which an OFT adapter cannot hold"):
        export_oft(tmp_path / "so8t", tmp_path / "oft")


def test_oft_refuses_an_eigenvalue_of_minus_one(tmp_path: Path) -> None:
    """Half a turn made of two quarters: theta is zero, the product is what counts."""
    model = attach(tiny_llama(), SO8TConfig(accumulate=True))
    for _ in range(2):
        with torch.no_grad():
            next(iter(gates(model).values())).theta[0, 0] = torch.pi / 2
        restart(model)
    save_adapter(model, tmp_path / "so8t")
    with pytest.raises(InputError, match=r"o_proj turns a plane by 3\.1416 rad"):
        export_oft(tmp_path / "so8t", tmp_path / "oft")


@pytest.mark.parametrize("blocks", [1, 4, 6, 8, 72, 384])
def test_the_shuffle_takes_each_lane_from_another_block(blocks: int) -> None:
    order = distant_channels(blocks)
    assert torch.equal(order.sort().values, torch.arange(8 * blocks))
    sources = order.view(blocks, 8) // 8
    assert all(len(set(row.tolist())) == min(8, blocks) for row in sources)
    if blocks >= 64:  # spread over the width: no two of a block's eight within a twelfth of it
        assert (sources.sort(dim=1).values.diff(dim=1) >= blocks // 12).all()


@pytest.mark.parametrize("scale", ["block", "channel"])
def test_a_scale_adds_no_rounding_to_bfloat16(scale: str) -> None:
    """The bound of the rotation alone, with M = R diag(exp(c)): 2^-8 (|y| + 2 |M - I| |x|), see block_product."""
    gate = RotationGate(64, init_scale=0.01, scale=scale)
    with torch.no_grad():
        gate.log_scale.normal_(std=0.01)
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        c = gate.log_scale.double()
        M = (
            torch.block_diag(*exp_so8(gate.theta.double()))
            * (c if scale == "channel" else c.repeat_interleave(8)).exp()
        )
        y = x.double() @ M.T
        allowed = 2**-8 * (y.abs() + 2 * x.double().abs() @ (M - torch.eye(64)).abs().T)
        assert (gate(x).double() - y).abs().le(allowed).all()
        assert not (gate(x).double() - x.double()).abs().le(allowed).all()


def test_an_adapter_learns_in_every_form(form: SO8TConfig) -> None:
    model = attach(tiny_llama(), form).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=0.01)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_every_option_trains_and_reloads_on_a_quantised_base(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from verification.engines.bitsandbytes_base import load_quantised

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    model = attach(load_quantised(tmp_path / "base", kind), copy.deepcopy(WHOLE))  # type: ignore[arg-type]
    assert len(config_of(model).shared or {}) == 3 * 2
    moved(model).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in trained)
    save_adapter(model.eval(), tmp_path / "adapter")
    again = load_adapter(load_quantised(tmp_path / "base", kind), tmp_path / "adapter").eval()  # type: ignore[arg-type]
    assert torch.equal(logits(again), logits(model))


def test_a_compiled_model_shares_and_learns_the_same() -> None:
    model = moved(attach(tiny_llama(), copy.deepcopy(FORMS["all shared"])))
    compiled = torch.compile(model, backend="eager")

    def gradients(called: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        called(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(compiled), gradients(model), strict=True))
