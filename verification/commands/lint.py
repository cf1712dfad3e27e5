"""`lint`: everything about a GGUF file that needs no inference, in seconds, with or without the reference.

Alone, the file is held against itself (`file_structure`, `sandbox`, its own template). With the Hugging Face directory
it was made from, also metadata (config.json and upstream's converter), token ids, chats and every tensor; with the base
and the adapter, the hypotheses that need R. Verdict: fail if a check failed, incomplete if one that was asked for could
not be made, otherwise pass; notes (fallback types, limits of the engine) decide nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import sha256_file
from verification.commands.lint_result import (
    LintCheck,
    LintFinding,
    LintHypothesis,
    LintReport,
    LintTensor,
    Status,
    Verdict,
    hypothesis_rows,
    tensor_row,
)
from verification.contract import chat, file_structure, metadata
from verification.contract.checks import TITLES, vocabulary_findings
from verification.contract.finding import Finding
from verification.engines.convert import convert_metadata
from verification.engines.llama_model import LlamaModel
from verification.engines.sandbox import Probe, probe
from verification.gguf.cache import Memory
from verification.gguf.reader import GGUFFile, read_gguf
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.compare import Examination, Sources, rotations
from verification.weight_parity.expected import inventory, is_known
from verification.weight_parity.recipe import recipe_differences
from verification.weight_parity.result import TensorResult

_FLUSHED = 1e-3  # share of a tensor's weights that is worth a note: single ones become zero in every F16 file
_TITLES = TITLES | {
    "loads": "llama.cpp loads the file",
    "finite_weights": "Weights that are NaN or Inf",
    "saturated_weights": "Weights at F16's end",
    "fallback_types": "Tensors in a fallback type",
    "recipe": "Tensors of another type than the file type's own recipe gives",
    "inventory": "Tensors missing or unexplained",
    "weights": "Tensors against the reference's values",
    "hypotheses": "Attention tensors nearest to something else",
    "sliding_window": "Sliding window that llama.cpp does not apply",
    "flushed_weights": "Small weights that became zero",
    "layer_outputs": "Tensors that only the error of their layer's output can judge",
    "other_maker": "Tensors of another quantiser, build or importance matrix",
}


def lint(
    file: str | Path,
    *,
    reference: str | Path | None = None,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    oracle: str | Path | None = None,
    converter: str | Path | None = None,
    memory: Memory | None = None,
) -> LintReport:
    """Examine one GGUF file without inference.

    Args:
        reference: the Hugging Face directory the file was made from.
        base, adapter: what the reference was baked from; they add hypotheses about o_proj and v_proj.
        oracle: a conversion of the reference that was made here already; None runs upstream's converter for its
            metadata.
        memory: tensors of other files that were examined before, against the same reference, base and adapter.

    Raises:
        InputError: a file that is no readable GGUF, a directory that is no checkpoint, a base without a reference.
    """
    if reference is None and (base is not None or adapter is not None):
        raise InputError("a base or an adapter was given without the reference they were baked into; add --reference")
    start = time.monotonic()
    opened = read_gguf(file)
    run = _Run(opened, memory)
    sources = None
    if reference is not None:
        checkpoint = Checkpoint(reference)
        sources = Sources(checkpoint, Checkpoint(base) if base else None, rotations(Path(adapter)) if adapter else {})
    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory(prefix="so8t-lint-") as scratch:
        # llama.cpp's loader and the converter are other processes: they work while this one reads tensors
        loaded = pool.submit(probe, opened.path)
        if sources is not None:
            target = Path(scratch) / "metadata.gguf"
            converted = pool.submit(_oracle, oracle, sources.reference.directory, target, converter)
            run.timed("weights", lambda: run.against_weights(sources))
        run.timed("file", lambda: run.itself(loaded))
        if sources is not None:
            run.timed("tokens", lambda: run.against_tokens(sources.reference))
            run.timed("metadata", lambda: run.against_metadata(sources.reference, converted))
    digest = sha256_file(opened.path)
    run.seconds["total"] = round(time.monotonic() - start, 2)
    return LintReport(
        verdict=_verdict(run.checks),
        file=str(opened.path),
        sha256=digest,
        bytes=opened.path.stat().st_size,
        architecture=opened.architecture,
        file_type=opened.file_type,
        tensors_total=len(opened.tensors),
        reference=None if reference is None else str(reference),
        checks=run.checks,
        tensors=run.tensors,
        hypotheses=run.hypotheses,
        seconds=run.seconds,
    )


def _oracle(given: str | Path | None, reference: Path, target: Path, converter: str | Path | None) -> Path:
    return Path(given) if given is not None else convert_metadata(reference, target, converter=converter)


def _verdict(checks: Sequence[LintCheck]) -> Verdict:
    statuses = {check.status for check in checks}
    return "fail" if "fail" in statuses else "incomplete" if "not evaluated" in statuses else "pass"


class _Run:
    """The checks of one file, in the order of the report."""

    def __init__(self, file: GGUFFile, memory: Memory | None = None) -> None:
        self.file, self.memory = file, memory
        self.checks: list[LintCheck] = []
        self.tensors: list[LintTensor] = []
        self.hypotheses: list[LintHypothesis] = []
        self.seconds: dict[str, float] = {}
        self.vocabulary_refused = ""
        self.known_good: set[str] = set()

    def timed(self, stage: str, work: Callable[[], None]) -> None:
        start = time.monotonic()
        work()
        self.seconds[stage] = round(time.monotonic() - start, 2)

    def add(self, name: str, findings: Sequence[Finding], *, note: bool = False, detail: str = "") -> None:
        """A check that fails, or only notes, when it found something."""
        status: Status = "pass" if not findings else "note" if note else "fail"
        rows = [LintFinding(**asdict(finding)) for finding in findings]
        self.checks.append(LintCheck(name=name, title=_TITLES[name], status=status, findings=rows, detail=detail))

    def skip(self, name: str, why: str) -> None:
        self.checks.append(LintCheck(name=name, title=_TITLES[name], status="not evaluated", detail=why))

    def itself(self, loaded: Future[Probe]) -> None:
        """Without any reference."""
        file, answer = self.file, loaded.result()
        self.vocabulary_refused = answer.vocabulary
        self.add("loads", file_structure.accepted(file, answer))
        self.add("layout", file_structure.layout(file))
        self.add("counts", file_structure.counts(file))
        self.add("vocabulary", file_structure.vocabulary(file))
        broken, saturated = file_structure.weights(file, known_good=self.known_good)
        self.add("finite_weights", broken)
        self.add("saturated_weights", saturated)
        self.add("file_type", file_structure.promised_types(file))
        self.add("fallback_types", file_structure.fallbacks(file), note=True)
        self.add("recipe", recipe_differences(file), note=True)
        if answer.vocabulary:
            self.skip("end_of_turn", f"llama.cpp cannot load the vocabulary: {answer.vocabulary}")
            return
        with LlamaModel(file.path, vocab_only=True) as model:
            self.add("end_of_turn", chat.end_of_turn(model))

    def against_weights(self, sources: Sources) -> None:
        """Inventory and every tensor's values."""
        file, found = self.file, inventory(sources.reference, self.file)
        if not is_known(file):
            why = f"{file.architecture or 'this family'} is not mapped by principle; `so8t verify` has an oracle for it"
            for name in ("inventory", "weights", "hypotheses"):
                self.skip(name, why)
            return
        again = "convert the reference again"
        odd = [Finding(name, "a tensor of the reference", "missing in the file", again) for name in found.missing]
        odd += [Finding(name, "no such tensor", "in the file, and nothing explains it", again) for name in found.extra]
        odd += [Finding(name, "a place in the file", "no GGUF name", again) for name in found.unmapped]
        self.add("inventory", odd)
        results = Examination(file, sources, found, memory=self.memory).run()
        self.known_good = {result.name for result in results if result.equal}
        hypothetical = {match.name for result in results for match in result.nearest if match.is_fault}
        findings = [finding for result in results for finding in result.findings]
        equal = sum(result.equal for result in results)
        values = [f for f in findings if f.where not in hypothetical or f.cause == ""]
        exact = f"{equal} of {len(results)} tensors are exactly what their type gives for the reference"
        self.add("weights", values, detail=exact)
        self.add("hypotheses", [f for f in findings if f.where in hypothetical and f.cause != ""])
        self.add("other_maker", _other_maker(results), note=True)
        if undecided := [r.name for r in results if r.open and not r.findings]:
            more = f" and {len(undecided) - 1} more" if undecided[1:] else ""
            self.skip("layer_outputs", f"{undecided[0]}{more}: not judged without activations; `so8t verify` has them")
        self.add("flushed_weights", _flushed(results), note=True)
        self.tensors = [tensor_row(result) for result in results]
        self.hypotheses = [row for result in results for row in hypothesis_rows(result)]

    def against_metadata(self, reference: Checkpoint, oracle: Future[Path]) -> None:
        """config.json, and what upstream's converter makes of it."""
        file = self.file
        self.add("metadata", metadata.against_config(reference.config, file))
        window = metadata.unused_window(reference.config, file)
        limits = [] if window is None else [
            Finding("sliding_window", f"attention over {window} tokens, as the reference", "attention over all tokens",
                    f"keep contexts within {window} tokens: beyond, llama.cpp and the reference differ")
        ]  # fmt: skip
        self.add("sliding_window", limits, note=True)
        try:
            wanted = read_gguf(oracle.result())
        except InputError as error:
            self.skip("oracle_metadata", str(error))
            return
        self.add("oracle_metadata", metadata.against_oracle(file, wanted, reference.config))

    def against_tokens(self, reference: Checkpoint) -> None:
        """Token ids, special ids, chats, stop set."""
        from verification.reference.tokenizer import load_tokenizer

        if self.vocabulary_refused:
            self.skip("token_ids", f"llama.cpp cannot load the vocabulary: {self.vocabulary_refused}")
            return
        directory, known = reference.directory, self.memory
        tokenizer = (
            load_tokenizer(directory) if known is None else known.recall(lambda: load_tokenizer(directory), "tokenizer")
        )
        found = vocabulary_findings(tokenizer, self.file, reference.directory, self.memory)
        for name, findings in found.items():
            if name != "end_of_turn":  # the file's own, made already
                self.add(name, findings)


def _other_maker(results: Sequence[TensorResult]) -> list[Finding]:
    """Quantised tensors whose bytes differ from the own quantiser's, within the bounds of their type."""
    found = []
    for result in results:
        if result.compared and not result.equal and not result.findings and result.blocks:
            text = f"{result.blocks_differ} of {result.blocks} blocks differ, relative error {result.rel_error:.3g}"
            action = "nothing, if an importance matrix or another build made the file"
            own = (
                "an own quantisation" if result.own_error is None else f"{result.own_error:.3g} of an own quantisation"
            )
            found.append(Finding(result.name, own, text, action))
    return found


def _flushed(results: Sequence[TensorResult]) -> list[Finding]:
    action = "nothing where the weights are as small as that; BF16 or F32 keep them"
    return [
        Finding(r.name, "no weight lost", f"{r.flushed} weights became zero", action, "below F16's smallest number")
        for r in results
        if r.flushed > _FLUSHED * r.size
    ]
