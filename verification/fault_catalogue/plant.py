"""Plants and judges faults: the healthy pairs, one faulty file at a time, and two usual checks beside the gate.

Measurements are stored by content. A forward pass does not use the tokenizer's keys, so a file with another template
has the logits of the healthy file, and only its tokens are measured again.
"""

from __future__ import annotations

import filecmp
import functools
import hashlib
import pickle
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from so8t_core.errors import InputError
from verification.contract.metadata import is_harmless
from verification.engines.quantise import Importance, quantise, quantised_bytes
from verification.fault_catalogue.diagnosis import diagnose
from verification.fault_catalogue.fault import Fault, Strength
from verification.fault_catalogue.file_gate import Judgement, decided, judge, logit_checks
from verification.fault_catalogue.models import (
    KINDS,
    SENTENCEPIECE,
    Healthy,
    make_family,
    make_main,
    make_plain,
    save_sharp,
    unknown_matrix,
)
from verification.fault_catalogue.peer_checks import KLD_BOUND, NMSE_BOUND, Others, Said, Texts, reference_texts
from verification.fault_catalogue.result import HealthyRow, Row, Says
from verification.gate.check import plain_check
from verification.gate.policy import Policy, make_policy
from verification.gguf.cache import tensor_key
from verification.gguf.reader import GGUFFile, read_gguf
from verification.gguf.writer import Raw
from verification.logit_parity.bake import saved_rounding
from verification.reference.checkpoint import Checkpoint

ELSEWHERE = "Q4_K_M made elsewhere"  # level of a row: maker and importance matrix unknown
# kinds whose faults change weights: only these depend on whether the file was made here or elsewhere
OF_WEIGHTS = ("adapter", "weights", "attention layout", "embedding and head", "number range", "other source", "norm")
QUICK_FAMILIES = ("llama", "gemma2", "phi3", "smollm3")
FAMILIES = ("llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "smollm3")
Tell = Callable[[str, int, int], None]


@dataclass
class Bench:
    """The healthy pairs, made when first needed, and the measurements of files by their content."""

    work: Path
    base: Path | None
    tokenizer: Any
    others: Others
    quick: bool
    pairs: dict[str, Healthy] = field(default_factory=dict)
    texts: dict[str, Texts] = field(default_factory=dict)
    said: dict[tuple[str, str], Said] = field(default_factory=dict)
    digests: dict[int, tuple[weakref.ref[GGUFFile], str]] = field(default_factory=dict)  # keeps no file open

    @property
    def model(self) -> str:
        return self.base.name if self.base else "a random Llama of four layers, width 256"

    @property
    def policy(self) -> Policy:
        """The default policy; it allows fallback types: a width that is not a multiple of 256 is not a fault here."""
        return make_policy({"contract": {"allow_fallback_types": True}})

    def offers(self, fault: Fault) -> bool:
        """Whether this run plants a fault: the short run has fewer pairs."""
        return not self.quick or (fault.quick and fault.pair.split()[0] in ("main", "mistral", *QUICK_FAMILIES))

    def pair(self, name: str) -> Healthy:
        """A healthy pair, made at its first use: "main", "plain" (main's base without a merge), or a family."""
        if name not in self.pairs:
            folder = self.work / name
            folder.mkdir(parents=True, exist_ok=True)
            if name in ("main", "plain"):
                base = self.base or save_sharp(self.work / "base", self.tokenizer)
                plain = name == "plain"
                self.pairs[name] = make_plain(base, folder) if plain else make_main(base, folder)
            else:
                words = None if name.split()[0] in SENTENCEPIECE else self.pair("main").tokenizer
                self.pairs[name] = make_family(name, folder, words)
        return self.pairs[name]

    def text(self, pair: Healthy) -> Texts:
        """The reference's logits, computed at their first use."""
        if pair.name not in self.texts:
            self.texts[pair.name] = reference_texts(pair.reference, pair.tokenizer, pair.work)
        return self.texts[pair.name]

    def healthy_rows(self, tell: Tell) -> Iterator[HealthyRow]:
        """Judge every healthy file of this run, including its logits."""
        names = ("plain", "main", *(QUICK_FAMILIES if self.quick else FAMILIES))
        for number, name in enumerate(names):
            for step, kind in enumerate(KINDS):
                tell("healthy files", len(KINDS) * number + step, len(KINDS) * len(names))
                yield self._healthy(self.pair(name), kind)

    def _healthy(self, pair: Healthy, kind: str) -> HealthyRow:
        file = pair.opened[kind]
        judgement = judge(pair, file.path, self.policy)
        kld, nmse = self.ask("kld", pair, file), self.ask("nmse", pair, file)
        checks = logit_checks(kind, kld, self.policy)
        alarms = [*judgement.caught_by, *(f"verify {c.name}" for c in checks if c.status != "pass")]
        bound = checks[0].bound
        return HealthyRow(
            pair=pair.name,
            level=kind,
            passed=not alarms and judgement.passed,
            alarms=alarms,
            mean_kld=kld.mean_kld,
            bound=float(bound) if isinstance(bound, int | float) else None,
            nmse=nmse.nmse,
            nmse_says=_says(nmse.nmse, NMSE_BOUND, nmse),
            entropy_share=self.entropy(pair),
        )

    def entropy(self, pair: Healthy) -> float:
        """Mean entropy of the reference's logits as a share of ln V."""
        rows = np.load(self.text(pair).rows, mmap_mode="r")[0].astype(np.float64)
        rows = rows - rows.max(axis=1, keepdims=True)
        p = np.exp(rows)
        total = p.sum(axis=1)
        return float(np.mean(np.log(total) - (p * rows).sum(axis=1) / total) / np.log(rows.shape[1]))

    def elsewhere_row(self, fault: Fault, strength: Strength, *, real: bool) -> Row:
        """Judge the fault in a file made elsewhere: the faulty float file quantised with an unknown matrix."""
        start, pair = time.monotonic(), self.pair(fault.pair.format(strength.value))
        faulty, target = self.work / "faulty-F16.gguf", self.work / "faulty.gguf"
        fault.plant(pair, pair.files[fault.level], faulty, strength.value)
        row = Row(
            fault=fault.name,
            kind=fault.kind,
            pair=fault.pair.split()[0],
            level=ELSEWHERE,
            strength=strength.label,
            value=None if np.isnan(strength.value) else strength.value,
            real=real,
            caught=True,
            caught_by=["cannot be quantised"],
        )
        try:
            judgement = judge(pair, as_quant(pair, read_gguf(faulty), target, elsewhere=True), self.policy)
        except InputError as error:  # llama.cpp refuses to make the file, for NaN for example
            row.diagnosis = str(error).replace(f"{self.work}/", "")  # there is no file to diagnose
        else:
            row.caught, row.caught_by = not judgement.passed, judgement.caught_by
            self._diagnose(row, fault, judgement)
        for path in (faulty, target):
            path.unlink(missing_ok=True)
        row.seconds = round(time.monotonic() - start, 2)
        return row

    def row(self, fault: Fault, strength: Strength, *, real: bool) -> Row:
        """Plant one fault, judge it, and run the two usual checks on it."""
        start = time.monotonic()
        pair = self.pair(fault.pair.format(strength.value))
        if fault.judged == "checkpoint":
            return self._checkpoint_row(fault, strength, pair, real=real)
        source, target = pair.files[fault.level], self.work / "faulty.gguf"
        target.unlink(missing_ok=True)
        fault.plant(pair, source, target, strength.value)
        judgement = judge(pair, target, self.policy)
        row = Row(
            fault=fault.name,
            kind=fault.kind,
            pair=fault.pair.split()[0],
            level=fault.level,
            strength=strength.label,
            value=None if np.isnan(strength.value) else strength.value,
            real=real,
            caught=not judgement.passed,
            caught_by=judgement.caught_by,
        )
        row.identical = "{" not in fault.pair and _same_bytes(source, target)
        if fault.logits or (not row.caught and not row.identical):
            self._logits(row, judgement, pair, target)
        self._diagnose(row, fault, judgement)
        if real or fault.logits:
            self._others(row, pair, target, judgement)
        target.unlink(missing_ok=True)
        row.seconds = round(time.monotonic() - start, 2)
        return row

    def _checkpoint_row(self, fault: Fault, strength: Strength, pair: Healthy, *, real: bool) -> Row:
        """Compare a saved checkpoint with the bake of base and adapter: the leg `dtype`, weight by weight."""
        start, target = time.monotonic(), self.work / "faulty-checkpoint"
        fault.plant(pair, pair.reference, target, strength.value)
        worst, where = saved_rounding(self.baked, Checkpoint(target))
        shutil.rmtree(target)
        found = plain_check("dtype.rounding", "Worst saved weight, in roundings of its type", worst, detail=where)
        (check,) = decided({"dtype": [found]}, self.policy)
        caught, bound = check.status != "pass", self.policy.dtype.rounding
        return Row(
            fault=fault.name,
            kind=fault.kind,
            pair=fault.pair.split()[0],
            level="checkpoint",
            strength=strength.label,
            value=None if np.isnan(strength.value) else strength.value,
            real=real,
            caught=caught,
            caught_by=["verify dtype.rounding"] if caught else [],
            margin=worst / bound if caught else None,
            margin_words=f"{worst:.4g} roundings, {bound:g} allowed",
            named_where=where if caught else "",
            diagnosis=f"the saved weight is {worst:.4g} roundings off the bake, {where}" if caught else "",
            named_kind="adapter" if caught else "",
            named_right=any(word in where for word in fault.where) if caught else None,
            seconds=round(time.monotonic() - start, 2),
        )

    @functools.cached_property
    def baked(self) -> Any:
        """Base and adapter, baked in float32."""
        from so8t_core import bake, load_adapter
        from verification.engines.huggingface import load_hf

        pair = self.pair("main")
        assert pair.base is not None
        assert pair.adapter is not None
        return bake(load_adapter(load_hf(pair.base), pair.adapter))

    def _logits(self, row: Row, judgement: Judgement, pair: Healthy, path: Path) -> None:
        assert judgement.file is not None
        said = self.ask("kld", pair, judgement.file)
        checks = logit_checks(row.level, said, self.policy)
        row.own_kld, row.own_kld_says = said.mean_kld, "pass" if checks[0].status == "pass" else "fail"
        judgement.checks += checks
        row.caught, row.caught_by = not judgement.passed, judgement.caught_by

    def _diagnose(self, row: Row, fault: Fault, judgement: Judgement) -> None:
        if not row.caught:
            return
        found = diagnose(judgement)
        if found is None:
            row.named_right = False
            return
        words, where = (text.replace(f"{self.work}/", "") for text in (found.words, found.where))
        row.diagnosis, row.named_kind, row.named_where = words, found.kind, where
        row.named_right = found.kind == fault.kind and any(word in where for word in fault.where)
        row.margin, row.margin_words = margin_of(judgement)

    def _others(self, row: Row, pair: Healthy, path: Path, judgement: Judgement) -> None:
        file = judgement.file
        if file is None or not judgement.loads:
            row.nmse_says = row.kld_says = "refused"
            return
        nmse = self.ask("nmse", pair, file)
        row.nmse, row.nmse_says = nmse.nmse, _says(nmse.nmse, NMSE_BOUND, nmse)
        if row.level != "F16":
            kld = self.ask("kld", pair, file)
        elif self.digest(file) == self.digest(pair.opened["F16"]):  # the forward pass is unchanged
            kld = self.ask("kld", pair, pair.opened["Q4_K_M"])
        else:
            quant = self.work / "faulty-Q4_K_M.gguf"
            try:
                kld = self.ask("kld", pair, read_gguf(as_quant(pair, file, quant)))
            except InputError as error:
                kld = Said(refused=str(error))
            quant.unlink(missing_ok=True)
        row.kld, row.kld_says = kld.kld, _says(kld.kld, KLD_BOUND, kld)

    def ask(self, what: Literal["nmse", "kld"], pair: Healthy, file: GGUFFile) -> Said:
        """Run one of the two usual checks, once for each content; KLD does not depend on the tokenizer's keys."""
        tokens = _token_keys(file) if what == "nmse" else ""
        key = what, f"{pair.name} {self.digest(file)} {tokens}"
        if key not in self.said:
            self.said[key] = getattr(self.others, what)(file.path, self.text(pair))
        return self.said[key]

    def digest(self, file: GGUFFile) -> str:
        """Digest of everything that a forward pass depends on: tensors, and keys without tokens or descriptions."""
        if id(file) in self.digests and self.digests[id(file)][0]() is file:
            return self.digests[id(file)][1]
        total = hashlib.blake2b(digest_size=16)
        for name in sorted(file.metadata):
            if not name.startswith("tokenizer.") and not is_harmless(name):
                total.update(f"{name}={file.metadata[name]!r};".encode())
        for tensor in sorted(file.tensors.values(), key=lambda t: t.name):
            total.update(repr(tensor_key(tensor)).encode())
        self.digests[id(file)] = weakref.ref(file), total.hexdigest()
        return total.hexdigest()


def _token_keys(file: GGUFFile) -> str:
    found = {k: v for k, v in file.metadata.items() if k.startswith("tokenizer.") or k == "general.name"}
    return hashlib.blake2b(pickle.dumps(sorted(found.items())), digest_size=16).hexdigest()


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether the faulty file equals the healthy one, bit by bit."""
    return filecmp.cmp(one, other, shallow=False)


def _says(value: float | None, bound: float, said: Said) -> Says:
    if said.refused or value is None:
        return "refused" if said.refused else "not run"
    return "pass" if value < bound else "fail"


def margin_of(judgement: Judgement) -> tuple[float | None, str]:
    """(largest ratio of value to bound, the ratio in words); the bound of a key is the spacing of float32."""
    options: list[tuple[float, str]] = []
    for check in judgement.failed:
        value, bound = check.value, check.bound
        if isinstance(value, int | float) and isinstance(bound, int | float) and bound > 0 and check.relation == "<=":
            options.append((float(value) / float(bound), f"{check.name} {float(value):.3g} / {float(bound):.3g}"))
    for row in judgement.linted.checks if judgement.linted else []:
        for finding in row.findings if row.status == "fail" and "metadata" in row.name else []:
            try:
                wanted, found = float(finding.expected), float(finding.found)
            except ValueError:
                continue
            if wanted:
                spacings = abs(found - wanted) / (abs(wanted) * 2.0**-24)
                options.append((spacings, f"{finding.where} off by {abs(found / wanted - 1):.2g}, float32 keeps 6e-8"))
    for tensor in judgement.linted.tensors if judgement.linted else []:
        if tensor.how == "refused" and tensor.own_error:
            ratio = (tensor.rel_error or 0.0) / tensor.own_error
            words = f"{tensor.name} error {ratio:.4g} times its own quantiser's"
            blocks = f"{tensor.blocks_differ} of {tensor.blocks} blocks differ where none may"
            options.append((ratio, f"{words}, {blocks}"))
    finite = [option for option in options if np.isfinite(option[0])]
    if finite:
        return max(finite)
    counts = [check for check in judgement.failed if isinstance(check.value, int) and check.bound == 0]
    return None, f"{counts[0].name} {counts[0].value}, must be 0" if counts else "refused"


def as_quant(pair: Healthy, opened: GGUFFile, target: Path, *, elsewhere: bool = False) -> Path:
    """Q4_K_M of a faulty float file; if only values of tensors changed, only these tensors are quantised again.

    llama.cpp quantises row by row and chooses types by name and shape, so the file equals the file of llama.cpp.

    Args:
        elsewhere: quantise with importance matrices that the gate does not get.

    Raises:
        InputError: weights that llama.cpp does not quantise.
    """
    healthy, matrix = pair.opened["F16"], unknown_matrix(opened) if elsewhere else {}
    if [(t.name, t.shape, t.type) for t in opened.tensors.values()] == [
        (t.name, t.shape, t.type) for t in healthy.tensors.values()
    ]:
        quant = pair.elsewhere if elsewhere else pair.opened["Q4_K_M"]
        if _spliced(healthy, quant, opened, target, matrix):
            return target
    return quantise(opened.path, target, "Q4_K_M", threads=1, imatrix=matrix)


def _spliced(healthy: GGUFFile, quant: GGUFFile, faulty: GGUFFile, target: Path, matrix: Importance) -> bool:
    """Write `quant` with the tensors of `faulty` that differ from `healthy`; False if one cannot be quantised."""
    raw, keys = Raw.read(quant.path), Raw.read(faulty.path)
    raw.keys = keys.keys | {
        k: v for k, v in raw.keys.items() if k in ("general.file_type", "general.quantization_version")
    }
    raw.arrays = keys.arrays
    for info in raw.tensors:
        mine = faulty.tensors[info.name]
        if not np.array_equal(mine.raw, healthy.tensors[info.name].raw):
            values = mine.values()
            data = quantised_bytes(values, quant.tensors[info.name].type, matrix.get(info.name))
            if data is None or not np.isfinite(values).all():  # llama.cpp checks its blocks and refuses some
                return False
            info.data = data.tobytes()
    raw.write(target)
    return True
