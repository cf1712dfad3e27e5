"""The divergence between trained and shipped model, if the base was quantised in training (QLoRA).

In training the adapter saw the errors of the quantised base, but the bake folds the adapter into the original base. So
the trained and the shipped model differ. This module measures their divergence on the corpus' chunks. The result is
information and decides nothing, because the verification starts at the baked model.
"""

from __future__ import annotations

from pathlib import Path

from verification.engines.bitsandbytes_base import Quantization, load_quantised, weight_error
from verification.gate.report import TrainedFunction
from verification.logit_parity.compare import Reference, Tell, saved_against
from verification.logit_parity.text import Corpus
from verification.reference.checkpoint import Checkpoint


def trained_function(
    base: Path, adapter: Path, kind: Quantization, text: Corpus, reference: Reference, *, seed: str, tell: Tell
) -> TrainedFunction:
    """Compare quantised base + adapter with the saved checkpoint, whose logits are in the spool.

    The model runs without gradients, as in use; in training bitsandbytes may order its sums differently.

    Raises:
        InputError: bitsandbytes is missing, or its version is known to be wrong.
    """
    from peft import prepare_model_for_kbit_training

    from so8t_core import load_adapter

    model = prepare_model_for_kbit_training(load_quantised(base, kind), use_gradient_checkpointing=False)
    model = load_adapter(model, adapter).eval()
    error, count = weight_error(model, Checkpoint(base).tensor)
    divergence = saved_against(
        model, text, reference, name=f"trained on the {kind} base", seed=seed, tell=tell, stage="trained function"
    )
    return TrainedFunction(quantization=kind, weight_error=error, weights=count, divergence=divergence)
