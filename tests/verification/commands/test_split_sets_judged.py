"""A set of shards has the verdict and the digits of the single file; one stale shard in it is refused."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from gguf_bytes import parts
from split_sets import split
from verification_models import Family

from verification import Report, verify
from verification.commands.lint import lint
from verification.commands.provenance import changed_artefacts
from verification.engines.convert import convert
from verification.engines.quantise import quantise
from verification.logit_parity.llama_cpp_commands import candidate_statistics, write_base_of


@pytest.fixture(scope="module")
def shards(family: Family, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split(family.files["Q8_0"], tmp_path_factory.mktemp("set"), stem="m-Q8_0")


def judged(family: Family, candidate: Path) -> Report:
    return verify(family.reference, [candidate], chunks=2, n_ctx=64, threads=1, work_dir=family.work)


def test_a_healthy_set_passes_with_the_digits_of_the_single_file(family: Family, shards: list[Path]) -> None:
    whole, found = judged(family, family.files["Q8_0"]), judged(family, shards[1])
    numbers = [{(leg.name, c.name): (c.status, c.value) for leg in r.legs for c in leg.checks} for r in (whole, found)]
    assert numbers[0] == numbers[1]  # intervals are drawn with a seed out of the digest
    assert (found.verdict, found.tensors) == (whole.verdict, whole.tensors)
    (artefact,) = (a for a in found.artefacts if a.role == "candidate")
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in shards)
    assert (artefact.path, artefact.sha256) == (str(shards[0]), hashlib.sha256(lines.encode()).hexdigest())
    assert artefact.bytes == sum(path.stat().st_size for path in shards)


def test_a_shard_that_changes_or_goes_is_seen_in_a_stored_report(
    family: Family, shards: list[Path], tmp_path: Path
) -> None:
    from verification.commands.provenance import artefacts
    from verification.gguf.candidate import Candidate
    from verification.gguf.reader import read_gguf

    own = [Path(shutil.copy(path, tmp_path)) for path in shards]
    file = Candidate("Q8_0", read_gguf(own[0]))
    stored = artefacts(family.reference, [file], base=None, adapter=None, corpus=None, policy=None)
    assert changed_artefacts(stored) == ([], [])
    last = bytearray(own[-1].read_bytes())
    last[-40] ^= 1
    own[-1].unlink()
    own[-1].write_bytes(last)
    assert changed_artefacts(stored) == ([str(own[0])], [])
    own[-1].unlink()
    assert changed_artefacts(stored) == ([str(own[0])], [])


def test_lint_and_kld_take_a_set_as_one_file(family: Family, shards: list[Path], tmp_path: Path) -> None:
    alone, found = lint(family.files["Q8_0"]), lint(shards[0].parent)
    assert found.verdict == alone.verdict == "pass"
    assert [(c.name, c.status) for c in found.checks] == [(c.name, c.status) for c in alone.checks]
    base = tmp_path / "b.kld"
    write_base_of(family.reference, base, chunks=4, n_ctx=64)
    assert candidate_statistics(base, shards[2]).text == candidate_statistics(base, family.files["Q8_0"]).text


def test_one_stale_shard_is_refused_by_its_tensors(family: Family, shards: list[Path], tmp_path: Path) -> None:
    """One shard of the model before it was baked, of the same shapes: no header can tell, the weights do."""
    before = quantise(convert(family.base, tmp_path / "b-F16.gguf", model_name="tiny"), tmp_path / "b.gguf", "Q8_0")
    stale = split(before, tmp_path / "set", stem="m-Q8_0")
    turned = next(n for n, path in enumerate(shards) if any("attn_output" in name for name in parts(path).tensors))
    for number, path in enumerate(shards):
        if number != turned:
            shutil.copyfile(path, stale[number])
    report = lint(stale[0], reference=family.reference)
    assert report.verdict == "fail"
    failed = {f.where for c in report.checks if c.status == "fail" for f in c.findings}
    assert any("attn_output" in where for where in failed)
    verdict = judged(family, stale[0].parent)
    assert verdict.verdict == "fail"
    assert any(c.status == "fail" for leg in verdict.legs if leg.name == "quantise" for c in leg.checks)
