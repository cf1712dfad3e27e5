"""The bake: W' = (W + s B A) @ R, in memory and on files the same bits, and a refusal leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from core_models import LORA, gap, logits, randomise, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from so8t_core import InputError, SO8TConfig, attach, bake, bake_checkpoint, gates, load_adapter, save_adapter
from so8t_core.files import sha256_path

OTHER_FILES = {
    "tokenizer.json": b'{"a":  1}\r\n',
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": "{{ '回転' }}".encode(),
    "LICENSE": b"text",
    "additional_chat_templates/tool.jinja": b"{}",
}
# the same weights for other frameworks, which no bake reaches
OTHER_WEIGHTS = dict.fromkeys(["onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5", "flax_model.msgpack"], b"w")


def tolerance(want: torch.Tensor, *, layers: int = 3, width: int = 48) -> float:
    """c * eps * sqrt(K) of the logits' size: each of about 7 products a layer may round anew; c = 8 for the tail."""
    return 8 * 7 * layers * width**0.5 * torch.finfo(want.dtype).eps * want.abs().max().item()


def make_base(directory: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    tiny_llama().to(dtype).save_pretrained(directory, **changes)
    for name, content in {**OTHER_FILES, **OTHER_WEIGHTS}.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def make_adapter(directory: Path, **config: object) -> Path:
    return save_adapter(randomise(attach(tiny_llama(), SO8TConfig(**config))), directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("bake") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("bake") / "adapter", layers=[0, -1], lora=LORA)


def load(directory: Path, dtype: torch.dtype | str = "auto"):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), angle=st.floats(0.01, 3), lora=st.sampled_from([None, LORA]))
def test_bake_commutes_with_forward(seed, angle, lora):
    model = randomise(attach(tiny_llama(seed=seed), SO8TConfig(lora=lora)), seed=seed, angle=angle)
    want = logits(model)
    assert bake(model) is model
    assert gap(logits(model), want) < tolerance(want)
    assert not any(isinstance(m, BaseTunerLayer) or m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "peft_config")
    assert gates(model) == {}


def test_every_wrong_bake_is_far_off():
    model = randomise(attach(tiny_llama(), SO8TConfig()))
    want = logits(model)
    turns = {name: torch.block_diag(*gate.rotation().detach()) for name, gate in gates(model).items()}
    wrong = {
        "R^T": lambda W, R: W @ R.T,
        "R @ W": lambda W, R: R @ W,
        "no bake": lambda W, R: W,
        "baked twice": lambda W, R: W @ R @ R,
    }
    distance = {}
    for variant, function in wrong.items():
        plain = tiny_llama()
        for name, R in turns.items():
            linear = plain.get_submodule(name)
            linear.weight.data = function(linear.weight.data, R)
        distance[variant] = gap(logits(plain), want)
    assert min(distance.values()) > 1000 * tolerance(want)
    lost = tiny_llama()
    for name, R in list(turns.items())[1:]:
        lost.get_submodule(name).weight.data @= R
    assert gap(logits(lost), want) > 1000 * tolerance(want)  # one layer forgotten


def test_a_mean_over_ten_logits_lets_a_wrong_bake_pass():
    """The original project's check (docs/original.md): 0.1 as a mean over the first ten logits of the last position."""
    model = randomise(attach(tiny_llama(), SO8TConfig()), angle=0.002)
    want = logits(model)
    turns = {name: torch.block_diag(*gate.rotation().detach()) for name, gate in gates(model).items()}
    wrong = tiny_llama()
    for name, R in turns.items():
        wrong.get_submodule(name).weight.data @= R.T
    got = logits(wrong)
    assert (got - want)[0, -1, :10].abs().mean().item() < 0.1  # measured 0.07
    assert gap(got, want) > 100 * tolerance(want)  # measured 0.26, 330 times what rounding can do
    assert gap(logits(bake(model)), want) < tolerance(want)


def test_peft_models_bake_to_the_plain_model():
    model = randomise(get_peft_model(tiny_llama(), SO8TConfig(lora=LORA)))
    want = logits(model)
    baked = bake(model)
    assert type(baked).__name__ == "LlamaForCausalLM"
    assert gap(logits(baked), want) < tolerance(want)
    assert list(baked.state_dict()) == list(tiny_llama().state_dict())


def test_a_model_without_or_with_a_merged_or_broken_adapter_is_not_baked():
    with pytest.raises(InputError, match="carries no SO8T adapter"):
        bake(tiny_llama())
    model = randomise(get_peft_model(tiny_llama(), SO8TConfig()))
    model.merge_adapter()
    with pytest.raises(InputError, match="merged into the weights already"):
        bake(model)
    model.unmerge_adapter()
    gates(model)["model.layers.0.self_attn.o_proj"].theta.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.o_proj: theta has a NaN or Inf"):
        bake(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_both_bakes_give_the_same_bits_and_every_other_byte_is_kept(tmp_path, adapter, dtype, sharded):
    base = make_base(tmp_path / "base", dtype, **({"max_shard_size": "20KB"} if sharded else {}))
    assert len(list(base.glob("*.safetensors"))) > 1 or not sharded
    before = sha256_path(base)
    out = bake_checkpoint(base, adapter, tmp_path / "out")
    assert sha256_path(base) == before
    want = bake(load_adapter(load(base), adapter)).state_dict()
    got = load(out).state_dict()
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == dtype
        assert torch.equal(got[name], want[name]), name
    plain = load(base).state_dict()
    changed = {name for name in got if not torch.equal(got[name], plain[name])}
    assert changed == {f"model.layers.{k}.self_attn.{p}_proj.weight" for k in range(3) for p in "qo"}
    files = [p.relative_to(base) for p in base.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    kept = [name for name in files if str(name) not in OTHER_WEIGHTS]
    assert len(files) == len(kept) + len(OTHER_WEIGHTS)
    assert [name for name in OTHER_WEIGHTS if (out / name).exists()] == []
    assert len(kept) >= len(OTHER_FILES) + 2
    for name in kept:
        assert (out / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_may_change(tmp_path, adapter, dtype):
    base = make_base(tmp_path / "base", max_shard_size="20KB")
    seen = []
    out = bake_checkpoint(base, adapter, tmp_path / "out", dtype=dtype, progress=lambda *pair: seen.append(pair))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {t.dtype for f in out.glob("*.safetensors") for t in load_file(f).values()} == {dtype}
    assert load(out).dtype == dtype
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() for p in load(base).parameters()) * dtype.itemsize
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    exact = load(bake_checkpoint(base, adapter, tmp_path / "exact", dtype=torch.float64)).state_dict()
    for name, tensor in load(out).state_dict().items():  # one rounding: half a step at most
        assert gap(tensor.double(), exact[name]) <= 0.5 * torch.finfo(dtype).eps * exact[name].abs().max()


def test_invert_is_the_negative_control(tmp_path, base, adapter):
    good = load(bake_checkpoint(base, adapter, tmp_path / "good"))
    bad = load(bake_checkpoint(base, adapter, tmp_path / "bad", invert=True))
    assert gap(logits(good), logits(bad)) > 0.1


def test_the_result_loads_where_so8t_is_not_installed(tmp_path, base, adapter, warm_python):
    want = logits(load_adapter(load(base), adapter))
    out = bake_checkpoint(base, adapter, tmp_path / "out")
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] == 'so8t_core': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "ids = (torch.arange(24).reshape(2, 12) * 7 + 3) % 64\n"
        "torch.save(model(input_ids=ids).logits.detach(), sys.argv[2])\n"
        "assert 'so8t_core' not in sys.modules\n"
    )
    done = warm_python.run("-c", code, out, tmp_path / "logits.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert gap(torch.load(tmp_path / "logits.pt"), want) < tolerance(want)


def damage_shard(base: Path, _: Path) -> None:
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def quantise(base: Path, _: Path) -> None:
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": "bitsandbytes"}}))


def to_int8(base: Path, _: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.ones(32, 32, dtype=torch.int8)
    save_file(tensors, base / "model.safetensors")


def narrow(base: Path, _: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.ones(32, 24)
    save_file(tensors, base / "model.safetensors")


def edit_adapter(change):
    def apply(_: Path, adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors, "base_model.model.model.layers.0.self_attn.o_proj.")
        save_file(tensors, adapter / "adapter_model.safetensors")

    return apply


def missing_shard(base: Path, _: Path) -> None:
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSALS = {
    "no base": (lambda b, a: shutil.rmtree(b), "is not a directory"),
    "no config": (lambda b, a: (b / "config.json").unlink(), "has no config.json"),
    "damaged config": (lambda b, a: (b / "config.json").write_text("{"), "config.json is damaged"),
    "no weights": (lambda b, a: (b / "model.safetensors").unlink(), "holds no model.safetensors"),
    "truncated": (damage_shard, "model.safetensors is damaged"),
    "empty": (lambda b, a: (b / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "missing shard": (missing_shard, "missing, first model-00001-of-00002.safetensors"),
    "quantised": (quantise, "is a quantised checkpoint .*take the original"),
    "int8 weight": (to_int8, "o_proj.weight is stored as I8, not as a plain weight"),
    "other width": (narrow, "made for another model: .*o_proj.weight has 24 columns, the rotation turns 32"),
    "no adapter": (lambda b, a: shutil.rmtree(a), "is not an adapter directory"),
    "NaN": (edit_adapter(lambda t, p: t[p + "lora_so8t.theta"].fill_(torch.nan)), "NaN or Inf in"),
    "half a LoRA": (edit_adapter(lambda t, p: t.pop(p + "base_layer.lora_B.weight")), "has no lora_B beside it"),
    "foreign": (edit_adapter(lambda t, p: t.update({p + "oft_R": torch.ones(2)})), "unknown tensor .*oft_R"),
    "bad theta": (
        edit_adapter(lambda t, p: t.update({p + "lora_so8t.theta": torch.ones(4, 27)})),
        r"\(4, 27\), a rotation is",
    ),
    "more layers": (
        edit_adapter(lambda t, p: t.update({p.replace("layers.0", "layers.7") + "lora_so8t.theta": torch.ones(4, 28)})),
        "made for another model: the base has no model.layers.7",
    ),
    "bad rank": (
        edit_adapter(lambda t, p: t.update({p + "base_layer.lora_A.weight": torch.ones(3, 32)})),
        r"is 32 x 32, its LoRA \(32, 2\) @ \(3, 32\)",
    ),
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(("damage", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_bad_input_is_refused_and_leaves_nothing_behind(tmp_path, base, adapter, damage, message, existing):
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    damage(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} <= {"base", "adapter", "out"}
    assert (tmp_path / "out").exists() == existing
    assert not existing or [p.name for p in (tmp_path / "out").iterdir()] == ["old"]


def test_overflow_to_float16_is_refused_half_way_and_leaves_nothing(tmp_path, base, adapter):
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 70000.0  # the last name in the file's order
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(InputError, match=r"model.norm.weight: 70000 does not fit torch.float16 \(largest 65504\)"):
        bake_checkpoint(tmp_path / "base", adapter, tmp_path / "out", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    bake_checkpoint(tmp_path / "base", adapter, tmp_path / "out", dtype=torch.bfloat16)


def test_an_existing_result_is_replaced_whole(tmp_path, base, adapter):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_text("old")
    bake_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out", ["base", "adapter", ".", "base/../base"])
def test_a_result_never_replaces_its_own_input(tmp_path, base, adapter, out):
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    before = sha256_path(tmp_path)
    with pytest.raises(InputError, match="would replace its own input"):
        bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / out)
    assert sha256_path(tmp_path) == before


def test_only_float_types_can_be_stored(tmp_path, base, adapter):
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(InputError, match="dtype must be float64, float32, float16 or bfloat16, got"):
            bake_checkpoint(base, adapter, tmp_path / "out", dtype=dtype)


def test_the_single_file_wins_over_an_index_as_it_does_in_transformers(tmp_path, base, adapter):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "absent.safetensors"}}')
    out = bake_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert not (out / "model.safetensors.index.json").exists()
    load(out)
