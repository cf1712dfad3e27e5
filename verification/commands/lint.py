"""`lint`: everything about a GGUF file that needs no inference, in seconds, with or without the reference.

Alone, the file is compared with itself (`file_structure`, `sandbox`, its own template). With the Hugging Face directory
it was made from, also metadata (config.json and upstream's converter), token ids, chats and every tensor; with the base
and the adapter, the hypotheses that need R. Verdict: fail if a check failed, incomplete if one that was asked for could
not be made, otherwise pass; notes (fallback types, limits of the engine) decide nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

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
    runs_on_row,
    tensor_row,
)
from verification.contract import chat, file_structure, metadata, other_kinds, tokens
from verification.contract.checks import TITLES, aborts, vocabulary_findings
from verification.contract.effects import written_otherwise
from verification.contract.finding import Finding, writable
from verification.engines.child import ChildDied
from verification.engines.convert import convert, convert_metadata
from verification.engines.sandbox import Vocabulary
from verification.gguf.cache import Memory
from verification.gguf.imatrix import is_legacy_imatrix, read_imatrix
from verification.gguf.kind import MATRIX_UNJUDGED, kind_of
from verification.gguf.reader import GGUFFile, read_gguf
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.compare import Examination, Sources, rotations
from verification.weight_parity.expected import (
    PREDICTION,
    inventory,
    inventory_by_conversion,
    is_known,
    left_out,
)
from verification.weight_parity.recipe import recipe_differences
from verification.weight_parity.result import TensorResult

_ROOM = 2.2  # sizes of the reference: 8-bit floats become 16-bit ones
_FLUSHED = 1e-3  # share of a tensor's weights that is worth a note: single ones become zero in every F16 file
_TITLES = TITLES | {
    "kind": "What the file is, and what of it is not judged",
    "parts": "Parts that do not belong together",
    "loads": "llama.cpp loads the file",
    "tokenises": "llama.cpp tokenises texts with the file",
    "template_powers": "What the chat template can do beside laying out a chat",
    "local_paths": "Paths of a computer that the file publishes",
    "written_otherwise": "Tokenizer keys that are written otherwise and mean the same",
    "unread_keys": "Keys that differ and that llama.cpp does not read",
    "finite_weights": "Weights that are NaN or Inf",
    "saturated_weights": "Weights at F16's end",
    "fallback_types": "Tensors in a fallback type",
    "recipe": "Tensors of another type than the file type's own recipe gives",
    "inventory": "Tensors missing or unexplained",
    "left_out": "Parts of the reference that the file leaves out",
    "weights": "Tensors against the reference's values",
    "hypotheses": "Attention tensors nearest to something else",
    "sliding_window": "Sliding window that llama.cpp does not apply",
    "flushed_weights": "Small weights that became zero",
    "layer_outputs": "Tensors that only the error of their layer's output can judge",
    "other_maker": "Tensors of another quantiser, build or importance matrix",
    "reference_files": "The reference's files and layers that are no part of it",
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
    if is_legacy_imatrix(file):
        return _legacy_imatrix(Path(file), start)
    opened = read_gguf(file)
    run = _Run(opened, memory)
    if not run.kind.loads:
        return _of_other_kind(run, None if reference is None else Path(reference), start)
    sources = None
    if reference is not None:
        checkpoint = Checkpoint(reference)
        sources = Sources(checkpoint, Checkpoint(base) if base else None, rotations(Path(adapter)) if adapter else {})
        if checkpoint.notes:
            action = "look whether the reference is the checkpoint that was meant"
            odd = [Finding("reference", "the model's own files and layers", note, action) for note in checkpoint.notes]
            run.add("reference_files", odd, note=True)
    quietly = np.errstate(all="ignore")  # damaged weights are seen in the values: numpy need not warn of them
    with quietly, ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory(prefix="so8t-lint-") as scratch:
        # llama.cpp's loader and the converter are other processes: they work while this one reads tensors
        loaded = pool.submit(_loaded, opened.path)
        if sources is not None:
            target = Path(scratch) / "converted.gguf"
            whole = not is_known(opened)  # then the conversion says what every tensor should be
            absent = left_out(sources.reference, opened)
            converted = pool.submit(
                _oracle, oracle, sources.reference, target, converter, whole=whole, prediction=PREDICTION not in absent
            )
            run.timed("weights", lambda: run.against_weights(sources, absent, converted if whole else None))
        with loaded.result() as model:
            run.timed("file", lambda: run.itself(model, alone=sources is None))
            if sources is not None:
                run.timed("tokens", lambda: run.against_tokens(sources.reference, model))
        if sources is not None:
            run.timed("metadata", lambda: run.against_metadata(sources.reference, converted))
    return _report(run, reference, start)


def _report(run: _Run, reference: str | Path | None, start: float) -> LintReport:
    """Everything that was found of a GGUF file."""
    opened, digest = run.file, run.file.digest
    run.seconds["total"] = round(time.monotonic() - start, 2)
    return LintReport(
        kind=run.kind.noun,
        verdict=_verdict(run.checks),
        file=writable(str(opened.path)),
        sha256=digest,
        bytes=opened.size,
        architecture=opened.architecture,
        file_type=opened.file_type,
        tensors_total=len(opened.tensors),
        runs_on=runs_on_row(opened) if run.kind.loads else None,
        reference=None if reference is None else writable(str(reference)),
        checks=run.checks,
        tensors=run.tensors,
        hypotheses=run.hypotheses,
        seconds=run.seconds,
    )


def _of_other_kind(run: _Run, reference: Path | None, start: float) -> LintReport:
    """A file that llama.cpp does not load as a model: structure and numbers; of a vocabulary also what it does."""
    kind, file = run.kind, run.file
    if kind.name == "vocabulary":
        with Vocabulary(file.path) as vocabulary:
            model = _Loaded("", vocabulary)
            run.add("vocabulary", file_structure.vocabulary(file))
            run.add("layout", file_structure.layout(file))
            run.add("local_paths", file_structure.published_paths(file), note=True)
            run.vocabulary_itself(model, alone=reference is None)
            if reference is not None:
                run.against_tokens(Checkpoint(reference), model)
        return _report(run, reference, start)
    run.add("layout", file_structure.layout(file))
    broken, saturated = file_structure.weights(file)
    run.add("finite_weights", broken)
    run.add("saturated_weights", saturated)
    run.add("local_paths", file_structure.published_paths(file), note=True)
    if reference is not None:
        run.skip("inventory", f"{kind.noun} is not compared with a reference; --reference is for language models")
    return _report(run, reference, start)


def _legacy_imatrix(path: Path, start: float) -> LintReport:
    """An importance matrix of the older form, which is no GGUF file."""
    problem, entries = "", 0
    try:
        entries = len(read_imatrix(path))
    except InputError as error:
        problem = str(error)
    rows = [] if not problem else [LintFinding(where=path.name, expected="sums and counts", found=writable(problem))]
    status: Status = "fail" if problem else "pass"
    why = f"its structure and numbers were judged, not {MATRIX_UNJUDGED}"
    checks = [
        LintCheck(name="parts", title=_TITLES["parts"], status=status, findings=rows),
        LintCheck(name="kind", title=_TITLES["kind"], status="not evaluated", detail=why),
    ]
    return LintReport(
        verdict=_verdict(checks),
        kind="an importance matrix of the older form (.dat)",
        file=writable(str(path)),
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        architecture="",
        file_type="none",
        tensors_total=entries,
        reference=None,
        checks=checks,
        seconds={"total": round(time.monotonic() - start, 2)},
    )


@dataclass
class _Loaded:
    """A file in llama.cpp, in a child: why it refuses the whole file, and a vocabulary that can be asked."""

    model_refused: str
    vocabulary: Vocabulary

    def __enter__(self) -> _Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.vocabulary.close()


def _loaded(path: Path) -> _Loaded:
    vocabulary = Vocabulary(path)
    refused = vocabulary.model_refused()
    if vocabulary.ended and not vocabulary.refused:  # while it loaded the whole file
        vocabulary.close()
        vocabulary = Vocabulary(path)
    return _Loaded(refused, vocabulary)


def _oracle(
    given: str | Path | None,
    reference: Checkpoint,
    target: Path,
    converter: str | Path | None,
    *,
    whole: bool,
    prediction: bool = True,
) -> Path:
    """A conversion of the reference: one made before, its metadata alone, or, `whole`, with every tensor.

    Args:
        prediction: with the layers that predict further tokens, which the file may leave out.

    Raises:
        InputError: the converter refuses the reference, or the disk has no room for a whole conversion.
    """
    if given is not None:
        return Path(given)
    if not whole:
        return convert_metadata(reference.directory, target, converter=converter, prediction=prediction)
    free = shutil.disk_usage(target.parent).free
    if free < _ROOM * reference.size:
        raise InputError(
            f"this family is judged by a conversion of the reference, which needs {_ROOM * reference.size / 2**30:.1f} "
            f"GiB in {target.parent}, and {free / 2**30:.1f} are free; set TMPDIR to a larger disk"
        )
    kind = reference.saved_in(None).lower()  # nothing is rounded
    return convert(reference.directory, target, outtype=kind, converter=converter, prediction=prediction)


def _verdict(checks: Sequence[LintCheck]) -> Verdict:
    statuses = {check.status for check in checks}
    return "fail" if "fail" in statuses else "incomplete" if "not evaluated" in statuses else "pass"


class _Run:
    """The checks of one file, in the order of the report."""

    def __init__(self, file: GGUFFile, memory: Memory | None = None) -> None:
        self.file, self.memory, self.kind = file, memory, kind_of(file)
        self.checks: list[LintCheck] = []
        self.tensors: list[LintTensor] = []
        self.hypotheses: list[LintHypothesis] = []
        self.seconds: dict[str, float] = {}
        self.known_good: set[str] = set()
        if self.kind.name not in ("model", "vocabulary", "diffusion", "other"):
            self.add("parts", other_kinds.parts(file, self.kind.name))
        if self.kind.unjudged and not self.kind.loads:
            self.skip("kind", f"{self.kind.noun}: its structure and numbers were judged, not {self.kind.unjudged}")
        elif self.kind.name != "model":
            left = f"no run of it is judged: {self.kind.unjudged}" if self.kind.unjudged else "nothing is left unjudged"
            self.add("kind", [Finding(file.path.name, "a language model", self.kind.noun, left)], note=True)

    def timed(self, stage: str, work: Callable[[], None]) -> None:
        start = time.monotonic()
        work()
        self.seconds[stage] = round(time.monotonic() - start, 2)

    def add(self, name: str, findings: Sequence[Finding], *, note: bool = False, detail: str = "") -> None:
        """A check that fails, or only notes, when it found something."""
        status: Status = "pass" if not findings else "note" if note else "fail"
        rows = [LintFinding(**{key: writable(text) for key, text in asdict(f).items()}) for f in findings]
        self.checks.append(LintCheck(name=name, title=_TITLES[name], status=status, findings=rows, detail=detail))

    def skip(self, name: str, why: str) -> None:
        self.checks.append(LintCheck(name=name, title=_TITLES[name], status="not evaluated", detail=why))

    def itself(self, model: _Loaded, *, alone: bool) -> None:
        """Check the file without any reference; `alone` says that none was given."""
        file = self.file
        self.add("loads", file_structure.accepted(file, model.model_refused))
        self.add("layout", file_structure.layout(file))
        self.add("counts", file_structure.counts(file))
        self.add("vocabulary", file_structure.vocabulary(file))
        broken, saturated = file_structure.weights(file, known_good=self.known_good)
        self.add("finite_weights", broken)
        self.add("saturated_weights", saturated)
        self.add("file_type", file_structure.promised_types(file))
        self.add("fallback_types", file_structure.fallbacks(file), note=True)
        self.add("recipe", recipe_differences(file), note=True)
        self.add("local_paths", file_structure.published_paths(file), note=True)
        if self.kind.name != "other":  # a decoder of sound has no vocabulary
            self.vocabulary_itself(model, alone=alone)

    def vocabulary_itself(self, model: _Loaded, *, alone: bool) -> None:
        """Check what llama.cpp does with the file's vocabulary and template."""
        file, vocabulary = self.file, model.vocabulary
        if vocabulary.refused:
            for name in ("tokenises", "end_of_turn"):
                self.skip(name, f"llama.cpp cannot load the vocabulary: {vocabulary.refused}")
            return
        try:
            tokens.use(vocabulary, file)
            self.add("tokenises", [])
        except ChildDied as error:
            self.add("tokenises", [aborts(str(error))])
            self.skip("end_of_turn", "llama.cpp ends while it tokenises")
            return
        stored = vocabulary.chat_template()
        if stored is None:
            self.add("end_of_turn", [])
            return
        with chat.FileTemplate(stored, vocabulary) as template:
            if alone:  # with a reference it stands among the tokens' checks
                self._end_of_turn(vocabulary, template)
            self.add("template_powers", template.powers(), note=True)

    def _end_of_turn(self, vocabulary: Vocabulary, template: chat.FileTemplate) -> None:
        try:
            self.add("end_of_turn", chat.end_of_turn(vocabulary, template))
        except ChildDied as error:
            self.add("end_of_turn", [aborts(str(error))])

    def against_weights(self, sources: Sources, absent: dict[str, list[str]], converted: Future[Path] | None) -> None:
        """Compare the inventory and every tensor's values with the reference's.

        Args:
            absent: parts of the reference that the file leaves out, with their tensors (`left_out`).
            converted: the reference's conversion, for a family that is not mapped by principle.
        """
        file, conversion = self.file, None
        if converted is None:
            found = inventory(sources.reference, file)
        else:
            try:
                conversion = read_gguf(converted.result())
                if not conversion.tensors:
                    raise InputError("the conversion that was given holds metadata alone")
            except InputError as error:
                why = f"{file.architecture or 'this family'} is not mapped by principle, and {error}"
                for name in ("inventory", "weights", "hypotheses"):
                    self.skip(name, why)
                return
            found = inventory_by_conversion(sources.reference, file, conversion)
        again = "convert the reference again"
        odd = [Finding(name, "a tensor of the reference", "missing in the file", again) for name in found.missing]
        odd += [
            Finding(name, "no such tensor", "in the file, and nothing explains it", again, code="unexplained_tensor")
            for name in found.extra
        ]
        odd += [Finding(name, "a place in the file", "no GGUF name", again) for name in found.unmapped]
        self.add("inventory", odd)
        if absent:
            action = "nothing, if the file is to hold the text model alone"
            groups = [
                Finding(
                    f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0], part, "not in the file", action
                )
                for part, names in absent.items()
            ]
            self.add("left_out", groups, note=True)
        results = Examination(file, sources, found, conversion=conversion, memory=self.memory).run()
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
        """Compare the metadata with config.json and with what upstream's converter makes of it."""
        file = self.file
        self.add("metadata", metadata.against_config(reference.config, file))
        window = metadata.unused_window(reference.config, file)
        limit = Finding(
            "sliding_window",
            f"attention over {window} tokens, as the reference",
            "attention over all tokens",
            f"keep contexts within {window} tokens: beyond, llama.cpp and the reference differ",
        )
        self.add("sliding_window", [] if window is None else [limit], note=True)
        try:
            wanted = read_gguf(oracle.result())
        except InputError as error:
            self.skip("oracle_metadata", str(error))
            return
        differ, harmless = written_otherwise(metadata.against_oracle(file, wanted, reference.config), file, wanted)
        self.add("oracle_metadata", differ)
        if harmless:
            self.add("written_otherwise", harmless, note=True)
        if unread := metadata.unread_differences(file, wanted):
            self.add("unread_keys", unread, note=True)

    def against_tokens(self, reference: Checkpoint, model: _Loaded) -> None:
        """Compare token ids, special ids, chats and the stop set."""
        from verification.reference.tokenizer import load_tokenizer

        if model.vocabulary.refused:
            self.skip("token_ids", f"llama.cpp cannot load the vocabulary: {model.vocabulary.refused}")
            return
        if any(check.name == "tokenises" and check.status == "fail" for check in self.checks):
            self.skip("token_ids", "llama.cpp ends while it tokenises")
            return
        directory, known = reference.directory, self.memory
        tokenizer = (
            load_tokenizer(directory) if known is None else known.recall(lambda: load_tokenizer(directory), "tokenizer")
        )
        found = vocabulary_findings(tokenizer, self.file, directory, known, model.vocabulary)
        for name, findings in found.items():
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
