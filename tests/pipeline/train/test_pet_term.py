"""PET in training: the chosen layers alone, blind to padding and to the seams of packed rows, and cheap to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, TrainingArguments

from pipeline.config import parse_config
from pipeline.train.collate import Collator
from pipeline.train.pet import HiddenStates, penalty, triples, unit_rms
from pipeline.train.trainer import SO8TTrainer
from so8t_core import SO8TConfig, attach, gates, pet_penalty, segments_of

IDS = torch.tensor([[1, 7, 3, 9, 4, 2, 8, 5], [6, 2, 9, 1, 1, 3, 5, 7]])
ROWS = [[5, 6, 7, 8, 9, 3], [9, 1, 4], [3, 3, 8, 1, 7], [2, 4]]


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        use_cache=False,
    )
    return attach(LlamaForCausalLM(config), SO8TConfig(init_scale=0.1))


@pytest.mark.parametrize(("layers", "want"), [([-1], [2]), ([0, -1], [0, 2]), ([1, 1, -2], [1])])
def test_the_chosen_layers_outputs_alone_are_kept_and_then_forgotten(layers: list[int], want: list[int]) -> None:
    model = model_of()
    states = HiddenStates(model, layers)
    output = model(input_ids=IDS, output_hidden_states=True)  # index k + 1: layer k's output, the last one normed
    taken = states.take()
    assert len(taken) == len(want)
    for index, h in zip(want, taken, strict=True):
        reference = output.hidden_states[index + 1]
        assert torch.equal(h if index < 2 else model.model.norm(h), reference)
    assert states.take() == []
    with torch.no_grad():
        model(input_ids=IDS)
    assert states.take() == []  # an evaluation keeps nothing


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_the_penalty_nor_its_gradient(reentrant: bool) -> None:
    def run(model: Any) -> list[Tensor]:
        states = HiddenStates(model, [0, -1])
        model(input_ids=IDS)
        bends = penalty(states.take(), {"input_ids": IDS})
        bends.backward()
        return [bends.detach(), *(gate.theta.grad for gate in gates(model).values())]

    plain, checked = model_of().train(), model_of().train()
    plain.enable_input_require_grads()
    checked.enable_input_require_grads()
    checked.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    want = run(plain)
    for found, grad in zip(
        run(checked), want, strict=True
    ):  # a layer that runs again adds its gradients in another order
        assert (found - grad).norm() <= 1e-6 * grad.norm()
    assert all(grad.abs().max() > 0 for grad in want)


def test_segments_begin_where_positions_do_not_go_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [5, 6, 7, 8, 9, 10, 11, 12]])
    assert segments_of(positions).tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8]


def test_a_packed_row_is_worth_its_sequences() -> None:
    lengths = [6, 3, 5, 2]
    h = torch.randn(1, sum(lengths), 8, generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"input_ids": torch.zeros(1, sum(lengths), dtype=torch.long), "position_ids": positions}
    assert triples(packed) == 4 + 1 + 3
    alone = [pet_penalty(unit_rms(part)) * max(part.shape[1] - 2, 0) for part in torch.split(h, lengths, dim=1)]
    assert penalty([h], packed).item() == pytest.approx((sum(alone) / 8).item(), rel=1e-6)
    assert penalty([h], {"input_ids": packed["input_ids"]}).item() != pytest.approx(
        penalty([h], packed).item(), rel=0.01
    )


def test_training_on_packed_rows_is_training_on_padded_ones(tmp_path: Path) -> None:
    """Through the Trainer, with transformers' own collator: position_ids and no attention_mask."""
    rows = [{"input_ids": ids, "labels": ids} for ids in ROWS]
    settings = parse_config(
        "{data: {generator: {rows: 1}}, train: {steps: 1, batch_size: 4, pet: {warmup: 5.0}}}"
    ).train

    def run(collator: Any, features: list[Any]) -> tuple[dict[str, float], list[Tensor]]:
        model = model_of().train()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=1,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            save_strategy="no",
            learning_rate=0.0,
        )
        trainer = SO8TTrainer(
            settings=settings, model=model, args=arguments, train_dataset=features, data_collator=collator
        )
        trainer.current_gradient_accumulation_steps = 1  # as its loop does
        batches, items = trainer.get_batch_samples(iter([collator(features)]), 1, torch.device("cpu"))
        loss = trainer.compute_loss(model, batches[0], num_items_in_batch=items)
        loss.backward()
        return trainer.take_terms(), [gate.theta.grad for gate in gates(model).values()]

    padded, want = run(Collator(pad_id=0), rows)
    packed, found = run(DataCollatorWithFlattening(), rows)
    assert packed["pet"] == pytest.approx(padded["pet"], rel=1e-5)
    for a, b in zip(found, want, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()  # float32 sums in another order

    def one_sequence(features: list[Any]) -> dict[str, Any]:  # the seams overlooked
        batch = DataCollatorWithFlattening()(features)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    assert run(one_sequence, rows)[0]["pet"] != pytest.approx(padded["pet"], rel=0.01)


def test_nothing_but_the_states_is_kept_for_the_backward() -> None:
    h = torch.randn(2, 64, 256).bfloat16().requires_grad_()
    state = h * 1.0
    inputs = {"input_ids": torch.zeros(2, 64, dtype=torch.long)}

    def kept(run: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(sizes.values())

    assert kept(lambda: penalty([state], inputs)) <= state.nbytes + 64
    assert kept(lambda: pet_penalty(unit_rms(state))) >= 7 * state.numel()  # two float32 copies would show
