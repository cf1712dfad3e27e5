"""Measure one arm's saved checkpoint, and the damage of its quantisation.

Held-out loss: mean cross-entropy per assistant token, nats. Second difference: the PET penalty of the last decoder
layer's states at unit RMS over held-out rows, the same quantity that training adds to the loss. Damage: mean KLD of the
GGUF file from the saved checkpoint in fp32. Answers: greedy, by llama.cpp from the Q8_0 file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F

from benchmarks.study.arms import Arm
from benchmarks.study.fitting import FIT_NAME, PROBE_ROWS, load
from pipeline.data.jsonl import read_jsonl
from pipeline.release.answers import judge, render_prompt
from pipeline.release.generate import complete
from pipeline.tokenizer import load_tokenizer
from pipeline.train.collate import Collator, EncodedRows
from pipeline.train.pet import decoder_layers, unit_rms
from so8t_core import bake_checkpoint, pet_penalty
from so8t_core.errors import InputError
from verification.engines.convert import convert
from verification.engines.huggingface import load_hf
from verification.engines.llama_model import LlamaModel
from verification.engines.quantise import quantise
from verification.logit_parity.compare import measure_file, passages_of, run_reference
from verification.logit_parity.text import DEFAULT_CORPUS, read_corpus

# Largest difference of loss, in nats, between the adapter's model in base_dtype and the saved checkpoint in fp32 on a
# few rows. Rounding of a bfloat16 forward pass changes a loss by hundredths at most (every record keeps both numbers),
# a lost merge by tenths.
SAME_MODEL = 0.1
Units = list[float]  # one value for each held-out row, prompt or chunk; an arm's figure is their mean


def save_checkpoint(arm: Arm, base_dir: Path, adapter_dir: Path, out_dir: Path) -> Path:
    """The arm as an ordinary checkpoint in the base's dtype; for the arm without training, the base itself."""
    if arm.method == "none":
        return base_dir
    if arm.method == "so8t":
        bake_checkpoint(base_dir, adapter_dir, out_dir)
        return out_dir
    saved = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, saved.get("dtype") or saved.get("torch_dtype"))
    peft = PeftModel.from_pretrained(load(base_dir, "float32"), str(adapter_dir))
    merged: Any = peft.merge_and_unload(safe_merge=True)
    merged.to(dtype).save_pretrained(str(out_dir))
    for file in base_dir.iterdir():  # tokenizer files byte for byte
        if not (out_dir / file.name).exists():
            shutil.copyfile(file, out_dir / file.name)
    return out_dir


@torch.no_grad()
def loss_and_bends(model: Any, rows: EncodedRows, collator: Collator, batch_size: int) -> tuple[Units, Units]:
    """For each row: (loss in nats per assistant token, second difference of the last layer's states at unit RMS)."""
    kept: list[torch.Tensor] = []
    layer = decoder_layers(model)[-1]
    handle = layer.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))
    losses: Units = []
    bends: Units = []
    try:
        for start in range(0, len(rows), batch_size):
            batch = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            labels = batch.pop("labels")[:, 1:]  # (B, T-1)
            logits = model(**batch, use_cache=False).logits[:, :-1]  # (B, T-1, V)
            states, mask = unit_rms(kept.pop()), batch["attention_mask"]  # (B, T, C), (B, T)
            for i in range(len(labels)):
                chosen = labels[i] != -100
                losses.append(F.cross_entropy(logits[i][chosen].float(), labels[i][chosen]).item())
                bends.append(pet_penalty(states[i : i + 1], mask[i : i + 1]).item())
    finally:
        handle.remove()
    return losses, bends


def evaluate(
    arm: Arm, base_dir: Path, adapter_dir: Path | None, heldout_path: Path, work_dir: Path, tell: Any
) -> dict[str, Any]:
    """All measurements of one arm.

    Raises:
        InputError: the saved checkpoint is not the trained model, or a refusal of the converter or llama.cpp.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        place = Path(folder)
        tell("saving")
        saved = save_checkpoint(arm, base_dir, adapter_dir or base_dir, place / "checkpoint")
        tokenizer = load_tokenizer(saved)
        collator = Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        heldout = EncodedRows(heldout_path, tokenizer, limit=arm.train.heldout_rows)
        model = load_hf(saved)
        found: dict[str, Any] = {}
        if adapter_dir is not None:
            trained = json.loads((adapter_dir / FIT_NAME).read_text(encoding="utf-8"))["probe_loss"]
            probe = EncodedRows(heldout_path, tokenizer, limit=PROBE_ROWS)
            found["probe_loss_saved"] = fmean(loss_and_bends(model, probe, collator, PROBE_ROWS)[0])
            check_same_model(arm.name, trained, found["probe_loss_saved"])
        tell("held-out rows")
        loss, bends = loss_and_bends(model, heldout, collator, arm.train.batch_size)
        files = {"F16": convert(saved, place / "model-F16.gguf", outtype="f16")}
        for kind in ("Q8_0", "Q4_K_M"):
            files[kind] = quantise(files["F16"], place / f"model-{kind}.gguf", kind, threads=1)
        units = {"heldout_loss": loss, "second_difference": bends}
        tell("quantisation damage")
        units |= _damage(arm, files, model, tokenizer, heldout_path, place)
        del model
        tell("answers")
        units |= _answers(arm, files[arm.config.answers.type], tokenizer, heldout_path)
        return found | {"units": {name: [round(value, 7) for value in unit] for name, unit in units.items()}}


def check_same_model(name: str, trained: float, saved: float) -> None:
    """Raises InputError if the saved checkpoint's loss differs from the trained model's."""
    if not abs(trained - saved) <= SAME_MODEL:
        raise InputError(
            f"arm {name}: the trained model's loss on {PROBE_ROWS} rows is {trained:.4f}, the saved checkpoint's "
            f"{saved:.4f}, more than {SAME_MODEL} apart: the merge is wrong; nothing was recorded"
        )


def _damage(
    arm: Arm, files: dict[str, Path], model: Any, tokenizer: Any, heldout_path: Path, place: Path
) -> dict[str, Units]:
    """For each chunk: mean KLD of each quantised file from the saved checkpoint."""
    settings = arm.config.verify
    with LlamaModel(files["F16"], vocab_only=True) as head:
        bos = head.bos if head.add_bos else None
    text = read_corpus([heldout_path, DEFAULT_CORPUS], tokenizer, n_ctx=settings.n_ctx, chunks=settings.chunks, bos=bos)
    reference = run_reference(model, passages_of(text.chunks), place, name="saved", tell=lambda *a: None)
    found: dict[str, Units] = {}
    with reference.spool:
        for kind, path in files.items():
            for chunk in text.chunks if kind != "F16" else ():
                one = replace(text, chunks=(chunk,))
                result = measure_file(kind, path, one, reference, seed=kind, threads=1, tell=lambda *a: None).divergence
                if result.non_finite or not result.tokens:
                    raise InputError(f"arm {arm.name}: {kind} gave {result.non_finite} positions with NaN or Inf")
                found.setdefault(f"kld_{kind.lower()}", []).append(result.mean_kld)
    return found


def _answers(arm: Arm, gguf: Path, tokenizer: Any, heldout_path: Path) -> dict[str, Units]:
    """For each prompt: 1 for an answer in /think form, and 1 for an exactly right answer."""
    settings = arm.config.answers
    rows = [row for row in read_jsonl(heldout_path) if row.get("answer")][: settings.prompts]
    given = complete(
        gguf,
        [render_prompt(tokenizer, row) for row in rows],
        max_new_tokens=settings.max_new_tokens,
        parallel=settings.parallel,
        threads=1,
    )
    scores = [judge(completion, row["answer"]) for completion, row in zip(given, rows, strict=True)]
    return {"form": [float(form) for form, _ in scores], "exact": [float(exact) for _, exact in scores]}
