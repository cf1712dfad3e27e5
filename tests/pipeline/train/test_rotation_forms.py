"""Laws of training in the rotation's other forms: rates of their own, restarts that resume exactly, chosen layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import Killed, _die_at, _train, data_dir  # noqa: F401 (a fixture)
from torch import nn

from pipeline.config import ConfigError, RunConfig, parse_config
from pipeline.tokenizer import load_tokenizer
from pipeline.train.collate import Collator, EncodedRows
from pipeline.train.fit import adapter_config, heldout_loss, load_base, rotation_off
from pipeline.train.placement import best_layers, rank
from pipeline.train.trainer import first_rows, last_complete_checkpoint
from so8t_core import attach, gates, load_adapter
from so8t_core.errors import InputError

TEXT = """
data: {generator: {rows: 24, heldout_rows: 6}}
train:
  steps: 5
  batch_size: 2
  learning_rate: 5.0e-3
  scale_learning_rate: 1.0e-3
  restart_every: 2
  targets: all-linear
  scale: channel
  shuffle: true
  pet: null
  checkpoint_every: 2
  heldout_rows: 4
"""


@pytest.fixture(scope="module")
def whole(tiny_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """An adapter of every option, trained without an interruption."""
    out = tmp_path_factory.mktemp("forms")
    record = _train(parse_config(TEXT), tiny_dir, data_dir, out)
    assert record.heldout_loss_after < record.heldout_loss_before
    assert record.heldout_loss_rotation_off == pytest.approx(record.heldout_loss_before, rel=1e-6)
    assert sorted(layer for layer, _, _ in record.angles_by_layer) == [0, 1]
    angles = next(curve.points for curve in record.curves if curve.name == "max_angle")
    assert record.angles_by_layer[0][2] > 0
    assert max(angle for _, angle in angles[:2]) > angles[2][1] > 0  # the third step starts at zero
    return out / "adapter"


def test_a_run_with_restarts_resumes_to_the_same_bits(
    whole: Path,
    tiny_dir: Path,
    data_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint at step 4 lies behind a restart: product, angles and the optimiser's state all come from it."""
    _die_at(5, monkeypatch)
    with pytest.raises(Killed):
        _train(parse_config(TEXT), tiny_dir, data_dir, tmp_path)
    checkpoint = last_complete_checkpoint(tmp_path / "checkpoints" / "main")
    assert checkpoint is not None
    monkeypatch.undo()
    _train(parse_config(TEXT), tiny_dir, data_dir, tmp_path)
    expected, found = (load_file(d / "adapter_model.safetensors") for d in (whole, tmp_path / "adapter"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    moved = [k for k in expected if k.endswith("accumulated")]
    assert moved
    assert all(not torch.equal(expected[k], torch.eye(8).double().expand_as(expected[k])) for k in moved)


def test_a_switched_off_rotation_comes_back(whole: Path, tiny_dir: Path, data_dir: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(tiny_dir)
    rows = EncodedRows(data_dir / "heldout.jsonl", tokenizer, limit=4)
    collator = Collator(tokenizer.pad_token_id)
    model = load_adapter(load_base(tiny_dir), whole)
    before = heldout_loss(model, rows, collator, 2)
    with rotation_off(model):
        off = heldout_loss(model, rows, collator, 2)
    assert off == pytest.approx(heldout_loss(load_base(tiny_dir), rows, collator, 2), rel=1e-6)
    assert heldout_loss(model, rows, collator, 2) == before != off


def test_each_kind_of_parameter_has_its_own_rate(tiny_dir: Path, tmp_path: Path) -> None:
    from pipeline.train.fit import training_arguments
    from pipeline.train.trainer import SO8TTrainer

    rates = {"learning_rate": 1e-3, "rotation_learning_rate": 2e-3, "scale_learning_rate": 3e-3, "weight_decay": 0.5}
    more = [f"train.{key}={value}" for key, value in rates.items()]
    settings = parse_config(TEXT, overrides=[*more, "train.lora={r: 2, targets: [o_proj]}"]).train
    model = attach(load_base(tiny_dir), adapter_config(settings))
    arguments = training_arguments(settings, tmp_path, 0)
    groups = SO8TTrainer(settings=settings, model=model, args=arguments).create_optimizer().param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    kinds = {"theta": (2e-3, 0.0), "log_scale": (3e-3, 0.0), "weight": (1e-3, 0.5)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert found[id(parameter)] == kinds[name.rpartition(".")[2]], name


class _Deaf(nn.Module):
    """A layer's attention output turned to zero: what is rotated before it cannot change the loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        out, *rest = self.inner(*args, **kwargs)
        return out * 0, *rest


def _ranked(config: RunConfig, model: nn.Module, base: Path, data: Path):
    tokenizer = load_tokenizer(base)
    rows = EncodedRows(data / "train.jsonl", tokenizer)
    return rank(model, config.train, first_rows(config.train, rows, config.seed), Collator(tokenizer.pad_token_id))


def test_the_score_is_the_gradient_and_a_deaf_layer_comes_last(tiny_dir: Path, data_dir: Path) -> None:  # noqa: F811
    config = parse_config(TEXT, overrides=["train.scale=none", "train.shuffle=false", "train.targets=[o_proj]"])
    model = load_base(tiny_dir)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    places = _ranked(config, model, tiny_dir, data_dir)
    assert {(p.layer, p.target) for p in places} == {(0, "o_proj"), (1, "o_proj")}
    assert places[0].score > places[1].score > 0
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())

    # by finite differences: a turn along the gradient by a small angle changes the loss by score x angle
    attached = attach(load_base(tiny_dir), adapter_config(config.train))
    tokenizer = load_tokenizer(tiny_dir)
    rows = EncodedRows(data_dir / "train.jsonl", tokenizer)
    batch = Collator(tokenizer.pad_token_id)(first_rows(config.train, rows, config.seed))
    gate = gates(attached)[f"model.layers.{places[0].layer}.self_attn.o_proj"]
    attached(**batch).loss.backward()
    step = 1e-2 * gate.theta.grad / gate.theta.grad.norm()
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            gate.theta.copy_(sign * step)
            losses.append(attached(**batch).loss.item())
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(places[0].score, rel=0.02)

    best = places[0].layer
    deaf = load_base(tiny_dir)
    deaf.model.layers[best].self_attn = _Deaf(deaf.model.layers[best].self_attn)
    order = [p.layer for p in _ranked(config, deaf, tiny_dir, data_dir)]
    assert order == [1 - best, best]
    assert best_layers(places, 1) == [best]
    with pytest.raises(InputError, match="auto:3, but only 2 layers"):
        best_layers(places, 3)


def test_auto_takes_the_layers_of_the_ranking(tiny_dir: Path, data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    more = ["train.layers=auto:1", "train.steps=1", "train.restart_every=null", "train.targets=[o_proj]"]
    config = parse_config(TEXT, overrides=more)
    (best,) = best_layers(_ranked(config, load_base(tiny_dir), tiny_dir, data_dir), 1)
    _train(config, tiny_dir, data_dir, tmp_path)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["layers"] == [best]


@pytest.mark.parametrize(
    "wrong", ["layers=auto:0", "layers=auto", "targets=[]", "targets=o_proj", "scale=row", "restart_every=0"]
)
def test_a_wrong_form_is_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"train.{wrong.partition('=')[0]}"):
        parse_config(TEXT, overrides=[f"train.{wrong}"])


@pytest.fixture(scope="module")
def chats(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Rows as a user has them: messages alone."""
    lines = (data_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": json.loads(line)["messages"]}) + "\n" for line in lines))
    return path


def test_the_verb_ranks_layers_and_targets_and_draws_them(
    tiny_dir: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.cli.layers_verb import layers
    from pipeline.train.layers import ranked_places

    layers(tiny_dir, chats, plot=tmp_path / "layers.svg", top=3)
    shown = capsys.readouterr().out
    places = ranked_places(tiny_dir, chats)
    assert len(places) == 2 * 4  # inputs of two layers: attention, o_proj, MLP, down_proj
    assert [p.score for p in places] == sorted((p.score for p in places), reverse=True)
    first = shown.splitlines()[1].split()
    assert first[:3] == [str(places[0].layer), places[0].target, f"{places[0].score:.3g}"]
    assert "5 more places" in shown
    ranking = best_layers(places, 2, ranked=True)
    assert f"most gradient first: {ranking[0]}, {ranking[1]}" in shown
    drawing = (tmp_path / "layers.svg").read_text(encoding="utf-8")
    assert all(f">{target}</text>" in drawing for target in ("q_proj", "o_proj", "gate_proj", "down_proj"))


def test_the_verb_names_what_is_wrong(tiny_dir: Path, chats: Path, tmp_path: Path) -> None:
    from pipeline.train.layers import ranked_places

    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        ranked_places(tiny_dir, tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="has a `qkv_proj`; its linear layers are"):
        ranked_places(tiny_dir, chats, targets=["qkv_proj"])
    with pytest.raises(InputError, match=r"has no config\.json|is not a directory"):
        ranked_places(tmp_path / "no-model", chats)
