"""Compares every tensor of a file with the reference's values, without inference.

The values are computed from the checkpoint (`expected`), or read from a conversion of the reference if the family is
not mapped. `values` compares one tensor. Attention tensors also get their nearest hypothesis (`hypotheses`), o_proj the
rotation that is left over. `explain` searches for the cause of a difference that has no cause yet.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from verification.contract.finding import Finding
from verification.engines.quantise import Importance, quantised_bytes
from verification.engines.reconversion import INTERMEDIATES, FloatFiles
from verification.gguf.cache import Memory, frame
from verification.gguf.reader import FLOAT_TYPES, GGUFFile, GGUFTensor
from verification.reference import families
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity import expected
from verification.weight_parity.expected import Inventory, is_known
from verification.weight_parity.explain import damage_cause, merge_cause
from verification.weight_parity.hypotheses import Known, Other, Role, Rotation, nearest, rotation_of, sample_rows
from verification.weight_parity.judge import judge
from verification.weight_parity.neighbours import AGAIN, VAGUE, held_together, merged_together
from verification.weight_parity.places import Heads
from verification.weight_parity.profile import error_profile
from verification.weight_parity.result import TensorResult
from verification.weight_parity.structure.rotation import residual_rotation
from verification.weight_parity.values import Measured, Start, Wanted, compared, distance

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
T = TypeVar("T")
_SPACING = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}  # largest relative distance of neighbouring numbers
_ATTENTION: dict[str, Role] = {"attn_output": "o", "attn_v": "v", "attn_q": "q", "attn_k": "k"}


@dataclass(frozen=True)
class Sources:
    """The checkpoints and rotations that the file can have been made from."""

    reference: Checkpoint
    base: Checkpoint | None = None
    rotations: dict[str, Rotation] = field(default_factory=dict)  # checkpoint weight name -> its input's rotation


def rotations(adapter: Path) -> dict[str, Rotation]:
    """The rotation R (in/8, 8, 8) or the fold of every rotated weight of an adapter directory, by checkpoint name.

    Raises:
        InputError: not an SO8T adapter.
    """
    from so8t_core.baking import folds_from_files
    from so8t_core.store import read_adapter

    folds = folds_from_files(*read_adapter(adapter))
    return {name: turned for name, fold in folds.items() if (turned := rotation_of(fold)) is not None}


class Examination:
    """Compares the tensors of one file with its sources."""

    def __init__(
        self,
        file: GGUFFile,
        sources: Sources | None,
        found: Inventory,
        *,
        conversions: FloatFiles | None = None,
        conversion: GGUFFile | None = None,
        importance: Importance | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Prepare the examination of one file.

        Args:
            sources: the checkpoints that the file can have been made from; None if there is only a conversion.
            conversions: the reference as float GGUF files, for tensors that `expected` cannot compute.
            conversion: in their place one whole conversion in the type that the reference is saved in, so that nothing
                of it was rounded.
            importance: the importance matrix that the user says was used for the file, by tensor.
            memory: stored results of other files with these sources and no matrix; None examines every tensor.
        """
        self.file, self.sources, self.found = file, sources, found
        self.memory = memory if conversion is None else None  # a memory knows nothing of the conversion
        self.conversions, self.conversion, self.importance = conversions, conversion, importance or {}
        self._sampled: dict[str, dict[str, Array]] = {}

    def run(self, threads: int = 2) -> list[TensorResult]:
        """Examine every tensor; numpy and the quantiser release the interpreter lock, so two threads save time."""
        if self.memory is None and self.sources is not None:
            for kind in _ATTENTION:
                self._samples(f"{kind}.weight")  # every attention tensor needs these samples
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(self._recalled, self.file.tensors.values()))
        results = merged_together(held_together(results, self.found.computed.keys()))
        return [self._traced(r) if r.findings and all(f.cause in VAGUE for f in r.findings) else r for r in results]

    def _traced(self, result: TensorResult) -> TensorResult:
        """Search for the cause of a finding that has no exact cause yet; see `explain`."""
        tensor, wanted = self.file.tensors[result.name], self.expected(result.name)
        if wanted is None or wanted.size != int(np.prod(tensor.shape)):
            return result
        wanted = wanted.reshape(tensor.shape)
        own = quantised_bytes(wanted, tensor.type)
        cause = None if own is None else damage_cause(tensor.raw, own, tensor.shape[0])
        base = self._base_of(result.name, self.found.source_of.get(result.name, ""))
        if cause is None and base is not None:
            before, step = self._values_before(tensor, wanted, own)
            cause = merge_cause(before, wanted, base.reshape(tensor.shape), step)
        if cause is None:
            return result
        findings = tuple(
            dataclasses.replace(f, cause=cause.words, code=cause.code) if f.cause in VAGUE else f
            for f in result.findings
        )
        return dataclasses.replace(result, findings=findings)

    def _values_before(
        self, tensor: GGUFTensor, wanted: Array, own: npt.NDArray[np.uint8] | None
    ) -> tuple[Array, Array | float]:
        """The file's values minus the quantiser's error on the expected values, and the type's step."""
        if own is None or tensor.type in FLOAT_TYPES:
            return tensor.values(), np.abs(wanted) * np.float32(_SPACING.get(tensor.type, 0.0))
        error = dataclasses.replace(tensor, raw=own).values() - wanted
        step = float(np.sqrt(12 * np.mean(error.astype(np.float64) ** 2)))  # rounding errors are uniform over one step
        return tensor.values() - error, step

    def with_error(self, result: TensorResult) -> TensorResult:
        """Add the distance from the reference to a proven tensor's result; the proof did not need the distance."""
        if not result.proof or result.rel_error is not None:
            return result
        tensor = self.file.tensors[result.name]
        found = self._remembered("distance", tensor, partial(self._distance, tensor))
        if found is None:
            return result
        return dataclasses.replace(result, rel_error=found[0], max_abs_error=found[1])

    def _distance(self, tensor: GGUFTensor) -> tuple[float, float] | None:
        wanted = self.expected(tensor.name)
        return None if wanted is None else distance(tensor.values(), wanted.reshape(tensor.shape))

    def _recalled(self, tensor: GGUFTensor) -> TensorResult:
        return self._remembered("examine", tensor, partial(self.examine, tensor))

    def _remembered(self, what: str, tensor: GGUFTensor, make: Callable[[], T]) -> T:
        """`make()`, called once for tensors of the same bytes in files of the same names and shapes."""
        if self.memory is None:
            return make()
        made = (
            self.conversions is not None and tensor.name in self.found.computed
        )  # `expected` then gives the conversion's values
        return self.memory.recall(make, f"{what} against the conversion" if made else what, self._frame, tensor)

    @cached_property
    def _frame(self) -> Hashable:
        return frame(self.file)

    def expected(self, name: str) -> Array | None:
        """One tensor's expected values before the file's rounding, in its shape; None if no source gives them.

        Tensors that the converter computes by a formula (RoPE factors) are read from its conversion if there is one,
        because another library's powers differ in the last bit.
        """
        kind = self.file.file_type if self.file.is_float else "F16"
        converted = None if self.conversions is None else self.conversions.tensor(kind, name)
        if converted is not None and name in self.found.computed:
            return converted.values()
        if self.sources is not None:
            values = expected.expectation(name, self.found, self.sources.reference, self.file)
            if values is not None:
                return values
        converted = converted or self._converted(name)
        return None if converted is None else converted.values()

    def _converted(self, name: str) -> GGUFTensor | None:
        """A tensor of the one conversion; a tied head that is written out is the embedding again."""
        if self.conversion is None:
            return None
        head = "token_embd.weight" if name == "output.weight" else name
        return self.conversion.tensors.get(name) or self.conversion.tensors.get(head)

    def _wanted(self, tensor: GGUFTensor, values: Array) -> Wanted:
        """The expected values with everything that a proof needs."""
        name, sources = tensor.name, self.sources
        source = self.found.source_of.get(name)
        mapped = sources is not None and (name in self.found.computed or (source and is_known(self.file)))
        exact = mapped or self.conversion is not None
        saved = sources.reference.saved_in(source) if sources is not None else "F16"
        return Wanted(
            values,
            (lambda: _own_starts(values)) if exact else (lambda: self._converted_starts(name, tensor.shape)),
            importance=self.importance.get(name),
            saved_in=saved,
            computed=name in self.found.computed and self.conversions is None,
        )

    def _converted_starts(self, name: str, shape: tuple[int, ...]) -> Iterator[Start]:
        """The tensor from every conversion, in the order of `INTERMEDIATES`."""
        for kind in INTERMEDIATES:
            converted = None if self.conversions is None else self.conversions.tensor(kind, name)
            if converted is not None and converted.shape == shape:
                yield Start(kind, converted.values())

    def examine(self, tensor: GGUFTensor) -> TensorResult:
        """Examine one tensor: compare its values, judge its error, then find its nearest hypothesis."""
        wanted = self.expected(tensor.name)
        if wanted is None:
            return self._alone(tensor)
        if wanted.size != int(np.prod(tensor.shape)) or not _one_shape(wanted.shape, tensor.shape):
            shape = Finding(tensor.name, f"shape {list(wanted.shape)}", f"{list(tensor.shape)}", AGAIN)
            bare = self._alone(tensor)
            return dataclasses.replace(bare, compared=True, roundings=np.inf, findings=(shape,))
        wanted = wanted.reshape(tensor.shape)
        own = self._converted(tensor.name)
        stored = own is not None and own.type == tensor.type and tensor.type not in FLOAT_TYPES  # gpt-oss: MXFP4
        if stored and own is not None and np.array_equal(own.raw, tensor.raw):
            proof = f"the reference's own {tensor.type}"
            return dataclasses.replace(self._alone(tensor), compared=True, proof=proof)
        measured = compared(tensor, self._wanted(tensor, wanted))
        measured = self._judged(tensor, wanted, measured)
        result = self._named(tensor, wanted, measured)
        if not result.findings or result.non_finite:
            return result
        values = tensor.values() if measured.values is None else measured.values
        return dataclasses.replace(result, profile=error_profile(values, wanted))

    def _judged(self, tensor: GGUFTensor, wanted: Array, measured: Measured) -> Measured:
        """Judge an unproven quantised tensor by its error, even if another build explains its blocks."""
        result, values = measured.result, measured.values
        if values is None or not result.blocks or result.equal or result.non_finite or not np.isfinite(wanted).all():
            return measured
        base = self._base_of(tensor.name, self.found.source_of.get(tensor.name, ""))
        found = judge(
            tensor, values, wanted, own=measured.own, base=base, heads=self._heads(tensor), saved=self._saved(tensor)
        )
        if result.explanation and not found.findings:
            return dataclasses.replace(
                measured, result=dataclasses.replace(result, along=found.direction, codes_nearest=found.nearest)
            )
        if result.findings:
            return measured
        judged = dataclasses.replace(
            result,
            explanation="" if found.findings else found.explanation,
            open=found.open,
            codes_nearest=found.nearest,
            findings=found.findings,
            along=found.direction,
        )
        return dataclasses.replace(measured, result=judged)

    def _heads(self, tensor: GGUFTensor) -> Heads:
        """Rows of a head in q, k and v; columns of a head in o."""
        role = _ATTENTION.get(tensor.name.removesuffix(".weight").rsplit(".", 1)[-1])
        config = {} if self.sources is None else self.sources.reference.config
        heads = config.get("num_attention_heads" if role in ("q", "o") else "num_key_value_heads")
        if role is None or len(tensor.shape) != 2 or not isinstance(heads, int) or not 0 < heads <= min(tensor.shape):
            return Heads()
        return Heads(columns=tensor.shape[1] // heads) if role == "o" else Heads(rows=tensor.shape[0] // heads)

    def _saved(self, tensor: GGUFTensor) -> float:
        """Half a rounding of the reference's type, relative: the maker may have quantised weights with more bits."""
        source = self.found.source_of.get(tensor.name)
        kind = "F32" if self.sources is None else self.sources.reference.saved_in(source)
        return _SPACING["BF16"] / 2 if kind == "BF16" else 0.0

    def _alone(self, tensor: GGUFTensor) -> TensorResult:
        """The result of a tensor without expected values: only the count of NaN and Inf."""
        values = tensor.values()
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        return TensorResult(tensor.name, tensor.type, compared=False, size=values.size, non_finite=bad)

    def _named(self, tensor: GGUFTensor, wanted: Array, measured: Measured) -> TensorResult:
        """Add the nearest hypothesis and the rotation left over; let them name the cause of a finding."""
        result, values, own = measured.result, measured.values, measured.own
        if self.sources is None:
            return result
        is_weight = tensor.name.endswith(".weight") and len(tensor.shape) == 2
        if not _is_attention(tensor) and not result.findings:
            return result
        values = tensor.values() if values is None else values
        if not np.isfinite(values).all():
            return result
        if len(tensor.shape) == 1:
            return _cause(result, _vector_cause(values, wanted))
        in_block = is_weight and tensor.name.startswith("blk.")
        parts = list(self._parts(tensor.name, wanted, values)) if in_block else []
        matches = tuple(nearest(name, actual, known, others) for name, actual, known, others in parts)
        named = not result.equal and any(match.is_fault for match in matches)
        # a hypothesis about the whole tensor is stronger than a finding about its error
        findings = [f for f in result.findings if not (named and (f.cause in VAGUE or f.code == "merge"))]
        for match in matches:
            if match.is_fault and not result.equal:  # a proven tensor may be nearer to a base on the type's grid
                far = f"relative distance {match.distance:.2g} (to the expected {match.expected_distance:.2g})"
                text = f"{match.best}, {far}"
                findings.append(Finding(match.name, "the reference's weight", text, AGAIN, match.best, match.code))
        residual = None
        if is_weight and ".attn_output." in tensor.name:
            # values of llama.cpp's quantiser have the same rounding as the tensor only if both have the same maker
            mine = own is not None and np.linalg.norm(values - own) < np.linalg.norm(values - wanted)
            reference = own if own is not None and mine else wanted
            residual = residual_rotation(wanted, values - reference)
            if residual is not None and residual.detected and not any(m.is_fault for m in matches) and not result.equal:
                findings.append(
                    Finding(
                        tensor.name,
                        "no rotation against the reference",
                        f"{residual.rms:.2g} rad (root mean square; largest {residual.largest:.2g} in channels "
                        f"{8 * residual.block}..{8 * residual.block + 7}, {residual.z_single:.0f} standard errors)",
                        "bake the adapter again and convert that",
                        "rotation off",
                        "rotation",
                    )
                )
        if findings and not any(f.cause for f in findings) and not matches:
            findings = [dataclasses.replace(findings[0], cause=_scale_cause(values, wanted)), *findings[1:]]
        return dataclasses.replace(result, nearest=matches, residual=residual, findings=tuple(findings))

    def _parts(self, name: str, wanted: Array, values: Array) -> Iterator[tuple[str, Array, Known, list[Other]]]:
        """The projections inside a tensor: one, or q, k and v in a fused tensor."""
        prefix, kind = ".".join(name.split(".")[:2]), name.split(".")[2]
        assert self.sources is not None  # `_named` calls this only with sources
        config = self.sources.reference.config
        heads = int(config.get("num_attention_heads") or 1)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        in_pairs = self.file.architecture in families.PERMUTED
        source = self.found.source_of.get(name, "")
        base = self._base_of(name, source)
        if kind != "attn_qkv":
            role = _ATTENTION.get(kind, "other")
            head_rows = wanted.shape[0] // {"q": heads, "k": kv_heads}.get(role, 1) if role in ("q", "k") else 0
            after = self.sources.rotations.get(self.found.source_of.get(f"{prefix}.attn_output.weight", ""))
            siblings = tuple(self._siblings(name, prefix))
            own = self.sources.rotations.get(source)
            known = Known(role, wanted, base, after, in_pairs, head_rows, siblings, own)
            yield name, values, known, self._others(name)
            return
        rows = wanted.shape[0] // (heads + 2 * kv_heads)
        cuts = np.cumsum([0, heads * rows, kv_heads * rows, kv_heads * rows])
        fused: tuple[Role, ...] = ("q", "k", "v")
        slices = {kind: slice(a, b) for kind, a, b in zip(fused, cuts, cuts[1:], strict=False)}
        for role, part in slices.items():
            siblings = tuple((f"the {other} rows", wanted[cut]) for other, cut in slices.items() if other != role)
            own_base = None if base is None else base[part]
            own = self.sources.rotations.get(source)
            known = Known(role, wanted[part], own_base, None, in_pairs, 0 if role == "v" else rows, siblings, own)
            yield f"{name} ({role} rows)", values[part], known, []

    def _base_of(self, name: str, source: str) -> Array | None:
        base = None if self.sources is None else self.sources.base
        if base is None or source not in base:
            return None
        values = expected.expected_values(name, source, base, self.file.architecture)
        tensor = self.file.tensors[name]  # a fine-tune may have more tokens than its base
        return values if values.size == int(np.prod(tensor.shape)) else None

    def _siblings(self, name: str, prefix: str) -> Iterator[tuple[str, Array]]:
        shape = self.file.tensors[name].shape
        for other, tensor in self.file.tensors.items():
            if other != name and other.startswith(f"{prefix}.") and tensor.shape == shape and other.endswith(".weight"):
                values = self.expected(other)
                if values is not None:
                    yield other.removeprefix(f"{prefix}.").removesuffix(".weight"), values

    def _samples(self, tail: str) -> dict[str, Array]:
        """A few expected rows (rows, columns) of one tensor in every layer, to recognise another layer's tensor."""
        if tail not in self._sampled:  # two threads that compute this at once get the same
            make = partial(self._sample, tail)
            known = self.memory
            self._sampled[tail] = make() if known is None else known.recall(make, f"samples {tail}", self._frame)
        return self._sampled[tail]

    def _sample(self, tail: str) -> dict[str, Array]:
        found = {}
        for name, tensor in self.file.tensors.items():
            if name.startswith("blk.") and name.split(".", 2)[2] == tail and len(tensor.shape) == 2:
                values = self.expected(name)
                if values is not None:
                    found[name] = sample_rows(values).copy()
        return found

    def _others(self, name: str) -> list[Other]:
        def loader(other: str) -> Array:
            values = self.expected(other)
            assert values is not None  # only tensors with values are sampled
            return values

        return [
            Other(f"the tensor of {other.rsplit('.', 2)[0]}", sample, lambda other=other: loader(other))  # type: ignore[misc]
            for other, sample in self._samples(name.split(".", 2)[2]).items()
            if other != name
        ]


def _one_shape(wanted: tuple[int, ...], actual: tuple[int, ...]) -> bool:
    """Whether two shapes of one size hold the same matrix; llama.cpp's quantiser drops outer dimensions of 1."""
    bare = [tuple(itertools.dropwhile(lambda size: size == 1, shape)) for shape in (wanted, actual)]
    return len(bare[0]) != 2 or bare[0] == bare[1]


def _own_starts(values: Array) -> Iterator[Start]:
    """The float forms of a checkpoint's values from which a quantiser may start."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float32)
    yield Start("F16", half)
    rounded = quantised_bytes(values, "BF16")
    assert rounded is not None  # a float type
    bf16 = GGUFTensor("", values.shape, "BF16", rounded).values()
    if not np.array_equal(bf16, half):
        yield Start("BF16", bf16)
    if not np.array_equal(values, half) and not np.array_equal(values, bf16):
        yield Start("F32", values)


def _is_attention(tensor: GGUFTensor) -> bool:
    """Whether a tensor is o, v, q, k, or q, k and v fused: hypotheses about these are always tested."""
    parts = tensor.name.split(".")
    kinds = (*_ATTENTION, "attn_qkv")
    return len(tensor.shape) == 2 and len(parts) == 4 and parts[0] == "blk" and parts[2] in kinds


def _cause(result: TensorResult, cause: str) -> TensorResult:
    findings = tuple(dataclasses.replace(f, cause=f.cause or cause) for f in result.findings)
    return dataclasses.replace(result, findings=findings)


def _vector_cause(values: Array, wanted: Array) -> str:
    """The cause in a norm or bias: 1 added or missing, or a common factor."""
    found, target = values.astype(np.float64), wanted.astype(np.float64)  # squares of RoPE factors may leave float32
    offset = found - target
    spread = float(np.abs(offset - offset.mean()).max(initial=0.0))
    for shift, words in ((1.0, "norm + 1 applied once too often"), (-1.0, "norm + 1 missing")):
        if abs(float(offset.mean()) - shift) < 1e-2 and spread < 1e-2:
            return words
    return _scale_cause(found, target)


def _scale_cause(values: Floats, wanted: Floats) -> str:
    square = float(np.vdot(wanted, wanted))
    factor = float(np.vdot(wanted, values)) / square if square else 1.0
    rest = float(np.linalg.norm(values - factor * wanted))
    return (
        f"scaled by {factor:.4g}"
        if abs(factor - 1) > 1e-4 and rest < 0.2 * float(np.linalg.norm(values - wanted))
        else ""
    )
