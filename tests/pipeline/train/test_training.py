"""Laws of training: resuming changes nothing, the right tokens are learned, mistakes are found before it starts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.train.fit as fit_module
import pipeline.train.trainer as trainer_module
from pipeline.config import RunConfig, parse_config
from pipeline.data.build import build_dataset
from pipeline.progress import Reporter
from pipeline.tokenizer import load_tokenizer
from pipeline.train.collate import Collator, EncodedRows, labelled_only
from pipeline.train.fit import adapter_config, heldout_loss, load_base, rotation_off, train
from pipeline.train.pet import unit_rms
from pipeline.train.trainer import last_complete_checkpoint
from so8t_core import attach, gates, load_adapter, pet_penalty
from so8t_core.errors import InputError
from verification.gate.report import TrainingRecord

TEXT = """
data: {generator: {rows: 24, heldout_rows: 6}}
train:
  steps: 6
  batch_size: 2
  learning_rate: 5.0e-3
  checkpoint_every: 2
  heldout_rows: 4
  lora: {r: 4, alpha: 8, targets: [q_proj, o_proj]}
"""


@pytest.fixture(scope="session")
def data_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("think-data")
    build_dataset(parse_config(TEXT).data, load_tokenizer(tiny_dir), folder, 0)
    return folder


def _train(config: RunConfig, base: Path, data: Path, out: Path) -> TrainingRecord:
    return train(config, base, data, out / "adapter", out / "checkpoints", Reporter(quiet=True))


@pytest.fixture(scope="session")
def trained(tiny_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingRecord]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return out / "adapter", _train(parse_config(TEXT), tiny_dir, data_dir, out)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_training_lowers_the_heldout_loss_and_turns_the_blocks(trained: tuple[Path, TrainingRecord]) -> None:
    _, record = trained
    assert record.heldout_loss_after < record.heldout_loss_before
    assert max(angle for _, _, angle in record.angles_by_layer) > 1e-3
    for (layer, _, largest), (same, blocks) in zip(record.angles_by_layer, record.angles_by_block, strict=True):
        assert layer == same
        assert max(blocks) == pytest.approx(largest, rel=1e-3)
    assert {"loss", "heldout_loss", "lambda", "pet", "orthogonality", "max_angle"} <= {c.name for c in record.curves}
    rates = [rate for curve in record.curves if curve.name == "learning_rate" for _, rate in curve.points]
    # one step of warm-up, then half a cosine over the other five; the rates that the steps were made with
    assert rates == pytest.approx([0.0, *(5e-3 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(5))])
    assert record.rotation_parameters == 2 * 32 * 28  # two layers, 256 / 8 blocks, 28 each


def test_resumed_run_equals_uninterrupted_run(
    trained: tuple[Path, TrainingRecord],
    tiny_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _die_at(5, monkeypatch)
    with pytest.raises(Killed):
        _train(parse_config(TEXT), tiny_dir, data_dir, tmp_path)
    checkpoint = last_complete_checkpoint(tmp_path / "checkpoints" / "main")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    monkeypatch.undo()
    record = _train(parse_config(TEXT), tiny_dir, data_dir, tmp_path)
    expected, found = _tensors(trained[0]), _tensors(tmp_path / "adapter")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert {c.name: c.points for c in record.curves} == {c.name: c.points for c in trained[1].curves}


def test_another_seed_gives_other_weights(
    trained: tuple[Path, TrainingRecord], tiny_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """So that equality above means something."""
    _train(parse_config(TEXT, overrides=["seed=1"]), tiny_dir, data_dir, tmp_path)
    expected, found = _tensors(trained[0]), _tensors(tmp_path / "adapter")
    assert any(not torch.equal(expected[k], found[k]) for k in expected)


def test_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-2" / trainer_module.CURVES_NAME).write_text("{}")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_reloaded_adapter_has_the_recorded_loss(
    trained: tuple[Path, TrainingRecord], tiny_dir: Path, data_dir: Path
) -> None:
    adapter, record = trained
    tokenizer = load_tokenizer(tiny_dir)
    rows = EncodedRows(data_dir / "heldout.jsonl", tokenizer, limit=4)
    model = load_adapter(load_base(tiny_dir), adapter)
    loss = heldout_loss(model, rows, Collator(tokenizer.pad_token_id), 2)
    assert loss == pytest.approx(record.heldout_loss_after, rel=1e-6)
    with rotation_off(model):
        assert heldout_loss(model, rows, Collator(tokenizer.pad_token_id), 2) != pytest.approx(loss, rel=1e-6)
    assert heldout_loss(model, rows, Collator(tokenizer.pad_token_id), 2) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("keeps", [True, False])
def test_heldout_loss_is_that_of_all_labels_wherever_logits_are_computed(
    keeps: bool, tiny_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "keeps_logits", lambda _: keeps)
    tokenizer = load_tokenizer(tiny_dir)
    rows = EncodedRows(data_dir / "heldout.jsonl", tokenizer, limit=3)
    model, collator = load_base(tiny_dir), Collator(tokenizer.pad_token_id)
    batch = collator([rows[i] for i in range(3)])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert heldout_loss(model, rows, collator, 2) == pytest.approx(expected, rel=1e-5)


def test_padding_changes_neither_loss_nor_mask_when_pad_is_eos() -> None:
    rows = [
        {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]},
        {"input_ids": [5, 6, 7, 8, 2], "labels": [-100, -100, 7, 8, 2]},
    ]
    batch = Collator(pad_id=2)(rows)
    assert batch["labels"][0].tolist() == [-100, 6, 2, -100, -100]  # the real eos stays, the padding is out
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]


def test_logits_of_labelled_positions_alone_give_the_same_loss_and_gradients(tiny_dir: Path) -> None:
    """float64: the two ways differ in the order of their sums alone, 1e-16 an operation over some thousand of them."""
    model = load_base(tiny_dir).double()
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
    ]
    batch = Collator(pad_id=2)(rows)
    weight = model.model.layers[0].self_attn.o_proj.weight

    def run(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
        outputs = model(**inputs)
        return outputs.loss, torch.autograd.grad(outputs.loss, weight)[0], outputs.logits.shape[1]

    loss, grad, positions = run(batch)
    fewer, same_grad, kept = run(labelled_only(batch))
    assert (positions, kept) == (5, 4)
    assert abs(loss - fewer) <= 1e-12 * loss
    assert (grad - same_grad).norm() <= 1e-12 * grad.norm()
    shifted = labelled_only({**batch, "labels": batch["labels"].roll(1, 1)})
    assert abs(run(shifted)[0] - loss) > 1e-3 * loss  # labels one place off would be seen


def test_unit_rms_makes_the_penalty_independent_of_scale() -> None:
    h = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    small, large = pet_penalty(unit_rms(h)), pet_penalty(unit_rms(h * 1000))
    assert torch.isclose(small, large, rtol=1e-5)  # the 1e-6 inside the root is 1e-6 of a mean square of 1
    assert pet_penalty(h * 1000) > 1e5 * pet_penalty(h)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lora.targets=[q_proj, qkv_proj]"], ["qkv_proj", "matches no layer", "q_proj"]),
        (["train.layers=[0, 2]"], ["layer 2", "2 layers"]),
    ],
)
def test_wrong_target_or_layer_is_found_before_training(tiny_dir: Path, overrides: list[str], words: list[str]) -> None:
    config = parse_config(TEXT, overrides=overrides)
    with pytest.raises(InputError) as caught:
        attach(load_base(tiny_dir), adapter_config(config.train))
    assert all(word in str(caught.value) for word in words), caught.value


def test_only_chosen_layers_turn(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    config = parse_config(TEXT, overrides=["train.layers=[-1]", "train.lora=null", "train.steps=2"])
    record = _train(config, tiny_dir, data_dir, tmp_path)
    assert [layer for layer, _, _ in record.angles_by_layer] == [1]
    assert list(gates(load_adapter(load_base(tiny_dir), tmp_path / "adapter"))) == ["model.layers.1.self_attn.o_proj"]


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantised_base_learns(kind: str, tiny_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    config = parse_config(TEXT, overrides=[f"train.quantization={kind}"])
    record = _train(config, tiny_dir, data_dir, tmp_path)
    assert record.heldout_loss_after < record.heldout_loss_before


def test_gradient_checkpointing_gives_the_same_adapter(
    trained: tuple[Path, TrainingRecord], tiny_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    _train(parse_config(TEXT, overrides=["train.gradient_checkpointing=true"]), tiny_dir, data_dir, tmp_path)
    expected, found = _tensors(trained[0]), _tensors(tmp_path / "adapter")
    # Recomputing takes the same operations in the same order; Adam could amplify only a last-bit difference.
    assert all(torch.allclose(expected[k], found[k], atol=1e-5) for k in expected)


def test_loss_that_is_not_finite_stops_with_the_way_out(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_dir, broken)
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"loss became nan.*learning_rate"):
        _train(parse_config(TEXT), broken, data_dir, tmp_path)


class Killed(Exception):
    pass


def _die_at(step: int, monkeypatch: pytest.MonkeyPatch, *, steps: int | None = None) -> None:
    """Stop at an optimiser step; `steps`: only in the fit of that length."""
    watch = trainer_module.Watch.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step and steps in (None, args.max_steps):
            raise Killed
        return watch(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer_module.Watch, "on_step_end", on_step_end)


def test_checkpoints_of_other_settings_are_not_resumed_from(
    trained: tuple[Path, TrainingRecord],
    tiny_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted, then changed: the result is that of the new settings from the start, not a mixture."""
    _die_at(5, monkeypatch)
    with pytest.raises(Killed):
        _train(parse_config(TEXT, overrides=["train.learning_rate=0.02"]), tiny_dir, data_dir, tmp_path)
    assert last_complete_checkpoint(tmp_path / "checkpoints" / "main") is not None
    monkeypatch.undo()
    _train(parse_config(TEXT), tiny_dir, data_dir, tmp_path)
    expected, found = _tensors(trained[0]), _tensors(tmp_path / "adapter")
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_what_stops_the_second_fit_neither_costs_the_first_nor_leaves_half_an_adapter(
    trained: tuple[Path, TrainingRecord],
    tiny_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = parse_config(TEXT, overrides=["train.so8t_only_steps=3"])
    _die_at(2, monkeypatch, steps=3)
    with pytest.raises(Killed):
        _train(config, tiny_dir, data_dir, tmp_path)
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    _die_at(1, monkeypatch, steps=6)  # the first fit must not run again
    record = _train(config, tiny_dir, data_dir, tmp_path)
    assert record.so8t_only is not None
    assert record.heldout_loss_rotation_off is not None
    expected, found = _tensors(trained[0]), _tensors(tmp_path / "adapter")
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert not (tmp_path / "checkpoints").exists()


def _in_micro_batches(base: Path, data: Path, out: Path) -> tuple[list[list[float]], list[dict[str, torch.Tensor]]]:
    """Losses and adapters of two steps of four rows, as one micro-batch and as four."""
    losses, adapters = [], []
    for size, count in ((4, 1), (1, 4)):
        given = ["train.steps=2", f"train.batch_size={size}", f"train.gradient_accumulation={count}"]
        given += ["train.pet={warmup: 1, main: 1, anneal: 1}"]
        record = _train(parse_config(TEXT, overrides=given), base, data, out / str(size))
        losses.append([v for c in record.curves if c.name in ("loss", "pet") for _, v in c.points])
        adapters.append(_tensors(out / str(size) / "adapter"))
    return losses, adapters


def _largest_difference(adapters: list[dict[str, torch.Tensor]]) -> float:
    one, other = adapters
    norm = torch.linalg.vector_norm
    return max((norm(one[name] - other[name]) / norm(one[name])).item() for name in one)


def test_accumulated_micro_batches_are_one_batch(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """Each label and each triple of PET weighs the same, however the rows fall into micro-batches."""
    losses, adapters = _in_micro_batches(tiny_dir, data_dir, tmp_path)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert _largest_difference(adapters) < 1e-4  # measured 2.8e-7; weighed wrongly it is 0.05, see below


def test_pet_as_a_mean_of_micro_batch_means_would_be_seen(
    tiny_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "triples", lambda inputs: torch.tensor(1.0))
    assert _largest_difference(_in_micro_batches(tiny_dir, data_dir, tmp_path)[1]) > 1e-3
