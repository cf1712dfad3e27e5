"""Phi-3.5-mini in miniature, in exactly the files of its Hub repository: what a user's own directory looks like.

The same architecture (`Phi3ForCausalLM`, LongRoPE stretched from 4096, fused qkv and gate_up, heads of 96 channels,
more embedding rows than tokens), the same special tokens in the same order with the same flags, and a chat template
that renders the same text. The vocabulary is a small SentencePiece model trained here on the project's own problems;
the weights are random and go to disk one layer at a time, so that the full size fits into memory as well.
The remote code beside it leaves a file behind when it is imported: it never must be.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import RunConfig, load_config
from verification.gate.report import Report
from verification.show.write import load_report

ROOT = Path(__file__).parents[1]

# in the order of their ids, which follow the SentencePiece pieces (32000 to 32010 in Phi-3.5)
SPECIALS = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)
KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")  # all other special tokens swallow the white space behind them
STOPS = ("<|end|>", "<|assistant|>", "<|endoftext|>")  # generation_config's eos list, in its order
ORIGINAL = 4096  # the length that the RoPE was trained for

# Renders what Phi-3.5's renders: known roles only, no empty system turn, every turn closed by <|end|> and a newline,
# and <|endoftext|> behind a finished conversation.
CHAT = (
    "{% for m in messages if m['role'] in ['user', 'assistant'] or (m['role'] == 'system' and m['content']) %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """The dimensions that the miniature changes; `FULL` is Phi-3.5-mini."""

    hidden: int = 768  # 8 heads of 96 channels, and three blocks of 256: K-quants are true
    heads: int = 8
    layers: int = 2
    intermediate: int = 256
    pieces: int = 1200  # SentencePiece's vocabulary
    rows: int = 1280  # of the embedding; more than pieces and specials, as Phi-3.5's 32064 for 32011
    layers_a_shard: int = 1


FULL = Size(hidden=3072, heads=32, layers=32, intermediate=8192, pieces=32000, rows=32064, layers_a_shard=4)


def save_miniature(
    directory: Path,
    size: Size | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weights: bool = True,
    canary: Path | None = None,
    name: str = "Phi-3.5-mini-instruct",
) -> Path:
    """Write the checkpoint.

    Args:
        weights: False leaves the safetensors files out and their index in, as in a repository fetched without them.
        canary: the file that the remote code beside the weights would leave behind.
        name: `_name_or_path` in config.json; the converter's first choice for general.name.
    """
    size = size or Size()
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "config.json", config(size) | {"_name_or_path": name})
    _tokenizer(directory, size)
    _remote_code(directory, canary or directory / "canary")
    (directory / "LICENSE").write_text("MIT\n", encoding="utf-8")
    (directory / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    _weights(directory, size, seed, dtype, write=weights)
    return directory


def config(size: Size) -> dict[str, Any]:
    """config.json with the keys and the older spelling of Phi-3.5's."""
    half = size.hidden // size.heads // 2
    end = size.pieces  # <|endoftext|>
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 131072,
        "model_type": "phi3",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.heads,
        "original_max_position_embeddings": ORIGINAL,
        "pad_token_id": end,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            # 1 to 3 and 1 to 64, growing with the wavelength, as published factors do
            "long_factor": [round(64 ** (i / (half - 1)), 4) for i in range(half)],
            "short_factor": [round(1 + 2 * i / (half - 1), 4) for i in range(half)],
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.3",
        "use_cache": True,
        "vocab_size": size.rows,
    }


# --- weights


def _weights(directory: Path, size: Size, seed: int, dtype: torch.dtype, *, write: bool) -> None:
    """Random weights under which activations keep their size and logits are far from uniform, shard by shard."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        out = torch.empty(rows, columns, dtype=dtype)
        for begin in range(0, rows, 4096):  # float32 numbers of a slice at a time
            part = torch.randn(min(4096, rows - begin), columns, generator=generator)
            out[begin : begin + len(part)] = part.mul_(std).to(dtype)
        return out

    def gains() -> Tensor:
        return torch.empty(size.hidden).uniform_(0.7, 1.3, generator=generator).to(dtype)  # a lost norm shows

    def layer(number: int) -> dict[str, Tensor]:
        unit, p = size.hidden**-0.5, f"model.layers.{number}."
        return {
            p + "input_layernorm.weight": gains(),
            p + "self_attn.qkv_proj.weight": normal(3 * size.hidden, size.hidden, 1.5 * unit),  # positions matter
            p + "self_attn.o_proj.weight": normal(size.hidden, size.hidden, 0.5 * unit),
            p + "post_attention_layernorm.weight": gains(),
            p + "mlp.gate_up_proj.weight": normal(2 * size.intermediate, size.hidden, unit),
            p + "mlp.down_proj.weight": normal(size.hidden, size.intermediate, 0.5 * size.intermediate**-0.5),
        }

    # Each token's row of the head leans towards the state that another token's embedding makes: one successor stands
    # out, as in text, and the rest of the logits depends on the layers.
    embedding = normal(size.rows, size.hidden, 1.0)
    successor = torch.randperm(size.rows, generator=generator)
    head = normal(size.rows, size.hidden, NOISE * size.hidden**-0.5)
    head += (embedding[successor].float() * (LEAN / size.hidden)).to(dtype)
    parts: list[dict[str, Tensor]] = []
    index: dict[str, str] = {}
    total = 0
    count = math.ceil(size.layers / size.layers_a_shard) + 1
    for number in range(count):
        if number == 0:
            part = {"model.embed_tokens.weight": embedding}
        else:
            first = (number - 1) * size.layers_a_shard
            part = {}
            for at in range(first, min(first + size.layers_a_shard, size.layers)):
                part |= layer(at)
            if number == count - 1:
                part |= {"model.norm.weight": gains(), "lm_head.weight": head}
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        if write:
            save_file(part, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
        total += sum(tensor.nbytes for tensor in part.values())
        parts.clear()
    _write(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )


LEAN = 16.0  # logit of the successor above the mean, where the layers leave the state as it is
NOISE = 2.0  # standard deviation of the others


# --- tokenizer


@functools.cache
def _sentencepiece(pieces: int) -> bytes:
    """A SentencePiece model with Phi-3's settings (BPE, byte fallback, a space in front), of the built-in problems."""
    import sentencepiece

    from pipeline.data.generator import generate

    rows = generate(600, 200, ["ja", "en"], 0)
    text = [line for group in rows for r in group for line in (r["prompt"], *r["steps"].splitlines(), r["answer"])]
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=stream,
        vocab_size=pieces,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        num_threads=1,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        hard_vocab_limit=True,
    )
    return stream.getvalue()


def _tokenizer(directory: Path, size: Size) -> None:
    model = directory / "tokenizer.model"
    model.write_bytes(_padded(_sentencepiece(min(size.pieces, 1200)), size.pieces))
    ids = {name: size.pieces + number for number, name in enumerate(SPECIALS)}
    names = {"<unk>": 0, "<s>": 1, "</s>": 2, **ids}
    flags = {
        number: {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": name not in KEEP_SPACES,
            "single_word": False,
            "special": name != "</s>",
        }
        for name, number in names.items()
    }
    _write(directory / "tokenizer.json", _tokenizer_json(model, flags))
    _write(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": {str(number): token for number, token in flags.items()},
            "bos_token": "<s>",
            "chat_template": CHAT,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "legacy": False,
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    _write(directory / "added_tokens.json", dict(sorted(ids.items())))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    _write(directory / "special_tokens_map.json", {key: {"content": name, **plain} for key, name in special.items()})
    _write(
        directory / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": [ids[name] for name in STOPS],
            "pad_token_id": ids["<|endoftext|>"],
            "transformers_version": "4.43.3",
        },
    )


def _padded(model: bytes, pieces: int) -> bytes:
    """The SentencePiece model with fillers up to `pieces`: the full size has 32000, our text does not give so many."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    parsed = proto.ModelProto()
    parsed.ParseFromString(model)
    for number in range(len(parsed.pieces), pieces):
        parsed.pieces.add(piece=f"\u2581filler{number}", score=-float(number))
    parsed.trainer_spec.vocab_size = pieces
    return bytes(parsed.SerializeToString())


def _tokenizer_json(model: Path, flags: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The same pieces as merges; a space mark before every stretch of text, spaces as marks, no BOS."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocabulary = {pieces.IdToPiece(i): i for i in range(pieces.GetPieceSize())}
    merges = []
    for piece, rank in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        local = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        merges += [(rank, vocabulary[a], vocabulary[b], a, b) for a, b in local]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    first = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **token} for number, token in flags.items()],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, mark]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                first,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [f"{a} {b}" for *_, a, b in sorted(merges)],
        },
    }


# --- remote code


def _remote_code(directory: Path, canary: Path) -> None:
    for module, name in (("configuration_phi3", "Phi3Config"), ("modeling_phi3", "Phi3ForCausalLM")):
        (directory / f"{module}.py").write_text(
            f"from pathlib import Path\n\nPath({str(canary)!r}).write_text({module!r})\n\n"
            f"from transformers import {name}  # noqa: E402, F401\n",
            encoding="utf-8",
        )


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- its run


# What a test changes of the shipped configuration for Phi-3.5-mini, besides the base.
AMOUNTS = (
    "threads=1",
    "data.sources=[]",
    "data.manifest=null",
    "data.generator={rows: 12, heldout_rows: 40}",
    "train.quantization=none",
    "train.steps=2",
    "train.batch_size=2",
    "train.gradient_accumulation=1",
    "train.checkpoint_every=2",
    "train.heldout_rows=2",
    "train.rotation_learning_rate=1e-2",
    "answers.prompts=0",
    "verify.chunks=24",
    "verify.n_ctx=128",
    "verify.base_damage=false",
)


def miniature_run(
    base: Path, run_dir: Path, *overrides: str, shipped: str = "phi35_mini.yaml", amounts: Sequence[str] = AMOUNTS
) -> RunConfig:
    """A shipped configuration with only the base, the place and the amounts changed."""
    changed = [f"model.base={base}", f"run_dir={run_dir}", *amounts, *overrides]
    return load_config(ROOT / "configs" / shipped, changed)


@dataclass(frozen=True)
class MiniatureRun:
    """A finished `so8t run` in `root`, and what its process and all that it started took."""

    root: Path
    config: RunConfig
    report: Report

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def dir(self) -> Path:
        return self.root / "run"

    @property
    def canary(self) -> Path:
        return self.root / "canary"

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds of a run in a new process, with those of its children."""
        return float(json.loads((self.root / "took.json").read_text())["cpu_seconds"])

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the run's process."""
        return int(json.loads((self.root / "took.json").read_text())["peak_bytes"])

    def file(self, kind: str) -> Path:
        return next((self.dir / "gguf").glob(f"*-{kind}.gguf"))


# The command itself, and at its end its peak: ru_maxrss survives exec and may be that of the process that started it.
RUN = """
import atexit, sys
def keep(path=sys.argv.pop(1)):
    with open("/proc/self/status") as status, open(path, "w") as out:
        out.write(next(line for line in status if line.startswith("VmHWM")))
atexit.register(keep)
from pipeline.cli.main import main
main()
"""


def prepare_miniature(
    root: Path, *, name: str, shipped: str = "phi35_mini.yaml", amounts: Sequence[str] = AMOUNTS
) -> RunConfig:
    """Make the base under a name in `root`, and beside it the configuration of its run, run.yaml."""
    base = save_miniature(root / "base", canary=root / "canary", name=name)
    config = miniature_run(base, root / "run", shipped=shipped, amounts=amounts)
    (root / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return config


def run_miniature(root: Path, *, name: str) -> None:
    """Prepare it and send it through the command `so8t run`, in a process of its own."""
    prepare_miniature(root, name=name)
    command = [sys.executable, "-c", RUN, str(root / "peak.txt"), "run", str(root / "run.yaml"), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(root / "said.txt", "w", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=root)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (root / "said.txt").read_text(encoding="utf-8")[-2000:]
    peak = 1024 * int((root / "peak.txt").read_text().split()[1])
    took = {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": peak}
    (root / "took.json").write_text(json.dumps(took), encoding="utf-8")


def finished_miniature(root: Path) -> MiniatureRun:
    """What a finished run left in `root`."""
    return MiniatureRun(root, load_config(root / "run.yaml"), load_report(root / "run" / "report" / "report.json"))
