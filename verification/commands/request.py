"""The parameters of a verification: one list for Python, the command line, pytest and `so8t run`.

`verify(...)` takes exactly these fields as its arguments. Importing this module loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from so8t_core.errors import InputError

if TYPE_CHECKING:
    from verification.engines.bitsandbytes_base import Quantization
    from verification.gate.policy import Policy
    from verification.gate.report import AnswerRecord, TrainingRecord
    from verification.logit_parity.run_modes import Level

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class VerifyRequest:
    """GGUF files to verify against the Hugging Face checkpoint they were made from, and how.

    Args:
        reference: directory of the saved (baked) checkpoint, or a reference file (`so8t reference`) that stands for it.
        candidates: GGUF files, or folders of them. Float files are measured in the leg `convert`, quantised ones in
            `quantise` and `quality`.
        base: directory of the model before training. Alone it adds a control; with `adapter` the legs `bake`, `dtype`
            and `controls`.
        adapter: directory of the adapter that the reference was baked with; needs `base`.
        policy: a policy, a YAML file, or None for the built-in policy.
        out: directory for report.json, .html, .md, report.intoto.json and junit.xml; None writes nothing.
        corpus: text or JSONL file or files to score; None takes the built-in text.
        chunks: number of chunks to score, at least 2.
        n_ctx: tokens in a chunk, at least 64; the second half of each chunk is scored.
        threads: CPU threads; None takes all cores.
        base_damage: also measure how the same quantisation changes the base model, on the first chunks. The result is
            information and never changes the verdict; `so8t run` asks for it.
        stream: read the reference (and base, adapter and bake) layer by layer, so that it need not fit into memory;
            None does so where the reference's float32 weights would not fit.
        cells: ways of running each file: "quick", or "full", which adds the long texts.
        ship_n_ctx: context in tokens that the files are shipped for, at least 64; None takes at most 4096 and never
            more than the original length of a stretched RoPE.
        long_context: tokens of one long passage whose end is scored, more than 1024; None measures a passage of 8192
            with cells = "full" only. Never more than the model's context.
        converter: directory of a llama.cpp checkout whose converter is used; None installs upstream's with pip.
        imatrix: importance matrix that the quantised candidates were made with, GGUF or legacy form.
        progress: called with (stage, done, total) while measuring.
        work_dir: directory that keeps the verifier's own conversions between runs; None takes a temporary one.
        training: the record of the training, for the report's curves.
        answers: held-out prompts answered by the shipped file, for the report.
        notes: sentences to put into the report.
        quantization: how the base was quantised while the adapter was trained; adds, as information, the divergence
            between the model as trained and the shipped checkpoint.
    """

    reference: str | Path
    candidates: Sequence[str | Path]
    _: KW_ONLY
    base: str | Path | None = None
    adapter: str | Path | None = None
    policy: Policy | str | Path | None = None
    out: str | Path | None = None
    corpus: str | Path | Sequence[str | Path] | None = None
    chunks: int = 12
    n_ctx: int = 512
    threads: int | None = None
    base_damage: bool = False
    stream: bool | None = None
    cells: Level = "quick"
    ship_n_ctx: int | None = None
    long_context: int | None = None
    converter: str | Path | None = None
    imatrix: str | Path | None = None
    progress: Progress | None = None
    work_dir: str | Path | None = None
    training: TrainingRecord | None = None
    answers: AnswerRecord | None = None
    notes: Sequence[str] = ()
    quantization: Quantization | None = None

    def check(self) -> None:
        """Refuse a request that cannot be verified.

        Raises:
            InputError: no candidate, too little text, an adapter without its base, an unknown level.
        """
        if not self.candidates:
            raise InputError("no candidate file was given; name at least one GGUF file")
        if self.chunks < 2 or self.n_ctx < 64:
            raise InputError(
                f"chunks = {self.chunks} and n_ctx = {self.n_ctx} score too little to decide on; at least 2 and 64"
            )
        if self.adapter is not None and self.base is None:
            raise InputError("an adapter was given without its base; give both or neither")
        if self.cells not in ("quick", "full"):
            raise InputError(f"cells = {self.cells!r} is unknown; quick or full")
        if self.ship_n_ctx is not None and self.ship_n_ctx < 64:
            raise InputError(f"ship_n_ctx = {self.ship_n_ctx} is too short for the cells; at least 64")
        from verification.logit_parity.run_modes import LONG  # imported here, because it loads numpy

        if self.long_context is not None and self.long_context <= LONG:
            raise InputError(f"long_context = {self.long_context} is no longer than the usual passages; above {LONG}")
