"""The re-quantised reference: healthy files of every type are explained, three planted faults are not, at each type."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tiny_gguf import importance, write_wide

from so8t_core.errors import InputError
from so8t_core.files import sha256_path
from verification.engines.quantise import quantise, quantised_bytes
from verification.engines.reconversion import FloatFiles, Oracle
from verification.gate.report import Check
from verification.gguf.candidate import Candidate
from verification.gguf.imatrix import read_imatrix
from verification.gguf.reader import FLOAT_TYPES, GGUFTensor, read_gguf
from verification.gguf.writer import Raw
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.block_bounds import hold
from verification.weight_parity.checks import quantise_checks, weight_checks
from verification.weight_parity.compare import Examination, Sources
from verification.weight_parity.expected import Inventory, inventory
from verification.weight_parity.recipe import recipe_differences

RECORDED = Path(__file__).parents[1] / "data" / "contracted_build.npz"
WITHOUT = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "IQ3_S",
    "IQ3_M",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
)
WITH = (
    "Q4_0",
    "Q5_1",
    "Q4_K_M",
    "Q2_K_S",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ3_XXS",
    "IQ3_XS",
)
SLOW = {"IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"}  # llama.cpp first builds a grid: seconds each
CASES = [
    pytest.param((kind, use), id=f"{kind}{'+imatrix' if use else ''}", marks=[pytest.mark.soak] if kind in SLOW else [])
    for kinds, use in ((WITHOUT, False), (WITH, True))
    for kind in kinds
]
# where a block keeps its float16 scale; IQ1_M spreads it over the top nibbles of four words
SCALE_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}
TURNED = "blk.1.attn_output.weight"


@dataclass(frozen=True)
class Made:
    """One type: the oracle's file, and the same from weights with one layer turned by 1e-3 rad."""

    healthy: Path
    rotated: Path
    source: Path
    imatrix: bool

    def check(self, path: Path) -> Check:
        """The check that must be zero."""
        return self.leg(path)[1]

    def leg(self, path: Path) -> list[Check]:
        return leg(path, self.source, importance() if self.imatrix else None)


def leg(path: Path, source: Path, matrix: dict[str, np.ndarray] | None = None) -> list[Check]:
    """The leg `quantise` of a file whose reference is known only as a float file."""
    file = read_gguf(path)
    floats = FloatFiles(lambda kind: read_gguf(source) if kind == "F16" else None)
    results = Examination(file, None, Inventory({}, [], [], []), conversions=floats, importance=matrix).run()
    return quantise_checks(Candidate("X", file), results, with_matrix=matrix is not None)


@pytest.fixture(scope="session")
def floats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("wide")
    return write_wide(root / "w.gguf"), write_wide(root / "r.gguf", rotate=1e-3)


@pytest.fixture(scope="module", params=CASES)
def case(request: Any, floats: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind, use = request.param
    root, matrix = tmp_path_factory.mktemp(kind), importance() if use else None
    healthy, rotated = (quantise(path, root / path.name, kind, imatrix=matrix) for path in floats)
    return Made(healthy, rotated, floats[0], use)


def patched(path: Path, target: Path, changes: dict[int, bytes]) -> Path:
    shutil.copyfile(path, target)
    with target.open("r+b") as stream:
        for offset, data in changes.items():
            stream.seek(offset)
            stream.write(data)
    return target


def block_size(tensor: GGUFTensor) -> int:
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]][1])


def scaled(tensor: GGUFTensor, block: int, steps: int) -> dict[int, bytes]:
    """One block's float16 scale moved by `steps` in its last bit; 1024 doubles it."""
    size = block_size(tensor)
    raw = bytearray(tensor.raw[block * size : (block + 1) * size].tobytes())
    if tensor.type == "IQ1_M":
        words = list(struct.unpack("<4H", raw[48:56]))
        value = sum((word >> 12) << (4 * i) for i, word in enumerate(words)) + steps
        words = [(word & 0x0FFF) | ((value >> (4 * i) & 0xF) << 12) for i, word in enumerate(words)]
        raw[48:56] = struct.pack("<4H", *words)
    else:
        at = SCALE_AT.get(tensor.type, 0)
        raw[at : at + 2] = struct.pack("<H", struct.unpack("<H", raw[at : at + 2])[0] + steps)
    return {tensor.offset + block * size: bytes(raw)}


def test_the_same_weights_give_the_same_bytes(case: Made) -> None:
    differ, unexplained = case.leg(case.healthy)
    assert (differ.value, unexplained.value) == (0, 0)
    assert differ.detail.startswith("21 of 21 tensors are proven")


def test_a_rotation_by_a_milliradian_in_one_layer_is_caught(case: Made) -> None:
    check = case.check(case.rotated)
    assert check.value == 1
    assert TURNED in check.detail


def test_a_tensor_of_another_layer_is_caught(case: Made, tmp_path: Path) -> None:
    file = read_gguf(case.healthy)
    here, there = file.tensors[TURNED], file.tensors["blk.0.attn_output.weight"]
    assert here.type == there.type
    check = case.check(patched(case.healthy, tmp_path / "x.gguf", {here.offset: there.raw.tobytes()}))
    assert check.value == 1
    assert TURNED in check.detail


def test_one_blocks_scale_twice_too_large_is_caught(case: Made, tmp_path: Path) -> None:
    tensor = read_gguf(case.healthy).tensors[TURNED]
    check = case.check(patched(case.healthy, tmp_path / "x.gguf", scaled(tensor, 17, 1024)))
    assert (check.value, TURNED in check.detail) == (1, True)


def test_the_scales_last_bit_is_explained_where_a_whole_build_shows_and_not_in_one_tensor(
    case: Made, tmp_path: Path
) -> None:
    quantised = [t for t in read_gguf(case.healthy).tensors.values() if t.type not in FLOAT_TYPES]
    everywhere = {at: data for tensor in quantised for at, data in scaled(tensor, 17, 1).items()}
    differ, unexplained = case.leg(patched(case.healthy, tmp_path / "x.gguf", everywhere))
    assert (differ.value, unexplained.value) == (len(quantised), 0), unexplained.detail
    assert f"{len(quantised)} judged healthy: {len(quantised)} by another build or machine" in differ.detail
    alone = next(tensor for tensor in quantised if tensor.name == TURNED)
    check = case.check(patched(case.healthy, tmp_path / "x.gguf", scaled(alone, 17, 1)))
    assert check.value == 1
    assert TURNED in check.detail


def test_a_norm_may_not_differ_at_all(case: Made, tmp_path: Path) -> None:
    tensor = read_gguf(case.healthy).tensors["blk.0.attn_norm.weight"]
    assert tensor.type in FLOAT_TYPES
    one_up = np.nextafter(tensor.raw.view(np.float32)[:1], np.float32(9)).tobytes()
    check = case.check(patched(case.healthy, tmp_path / "x.gguf", {tensor.offset: one_up}))
    assert check.value == 1


def recorded() -> Iterator[Any]:
    with np.load(RECORDED) as data:
        for key in data.files:
            kind, name, what = key.split("|")
            if what == "rows":
                base = kind.removesuffix("+imatrix")
                marks = [pytest.mark.soak] if base in SLOW else []
                yield pytest.param(
                    base, kind != base, name, data[key], data[f"{kind}|{name}|blocks"], id=kind, marks=marks
                )


@pytest.mark.parametrize(("kind", "use", "name", "rows", "blocks"), list(recorded()))
def test_what_a_contracting_build_really_wrote_is_explained(
    floats: tuple[Path, Path], tmp_path: Path, kind: str, use: bool, name: str, rows: Any, blocks: Any
) -> None:
    """Blocks recorded from llama.cpp built with -ffp-contract=fast and FMA, as arm64 compilers do by default."""
    healthy = quantise(floats[0], tmp_path / "h.gguf", kind, imatrix=importance() if use else None)
    tensor = read_gguf(healthy).tensors[name]
    size = block_size(tensor)
    changes = {tensor.offset + int(row) * size: block.tobytes() for row, block in zip(rows, blocks, strict=True)}
    theirs = patched(healthy, tmp_path / "c.gguf", changes)
    found = hold(read_gguf(theirs).tensors[name], tensor.raw, read_gguf(floats[0]).tensors[name].values(), imatrix=use)
    assert found.within, str(found)
    assert (found.differ, found.blocks) == (len(rows), len(tensor.raw) // size)
    # Alone among tensors that equal the oracle it cannot come from another build, which would have changed them too.
    check = Made(healthy, healthy, floats[0], use).check(theirs)
    assert check.value == 1
    assert name in check.detail


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("token_embd.weight", "Q8_0"),
        ("blk.1.ffn_down.weight", "Q5_K"),
        ("output.weight", "F16"),
        ("blk.0.attn_q.weight", "IQ4_XS"),
    ],
)
def test_a_mix_of_types_is_proven_tensor_by_tensor_and_the_recipe_noted(
    floats: tuple[Path, Path], tmp_path: Path, name: str, kind: str
) -> None:
    """One tensor at another type than Q4_K_M's own recipe gives it, as `--tensor-type` writes it."""
    raw, source = Raw.read(quantise(floats[0], tmp_path / "h.gguf", "Q4_K_M")), read_gguf(floats[0]).tensors[name]
    (info,) = [info for info in raw.tensors if info.name == name]
    recorded_type = GGMLQuantizationType(info.kind).name
    data = quantised_bytes(source.values(), kind)
    assert data is not None
    info.kind, info.data = int(GGMLQuantizationType[kind]), data.tobytes()
    mixed = raw.write(tmp_path / "x.gguf")
    assert [check.value for check in leg(mixed, floats[0])] == [0, 0]
    found = recipe_differences(read_gguf(mixed))
    assert [(f.where, f.expected, f.found) for f in found] == [(name, recorded_type, kind)]
    other = quantised_bytes(source.values()[::-1], kind)  # another tensor's bytes at that type are no mix
    assert other is not None
    info.data = other.tobytes()
    assert [check.value for check in leg(raw.write(tmp_path / "y.gguf"), floats[0])] == [1, 1]


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_S", "IQ4_XS", "Q3_K_L", "Q2_K"])
def test_a_file_by_llama_cpps_own_recipe_has_no_other_types(
    floats: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    assert recipe_differences(read_gguf(quantise(floats[0], tmp_path / "h.gguf", kind))) == []
    with_matrix = quantise(floats[0], tmp_path / "m.gguf", kind, imatrix=importance())
    assert recipe_differences(read_gguf(with_matrix)) == []


@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_XS", "Q2_K"])
def test_a_partial_importance_matrix_is_used_as_llama_cpp_uses_it(
    floats: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    """Tensors without an entry are quantised without one; the whole matrix then names the tensors it contradicts."""
    whole = importance()
    partial = {name: values for name, values in whole.items() if not name.startswith("blk.1.")}
    made = quantise(floats[0], tmp_path / "p.gguf", kind, imatrix=partial)
    assert [check.value for check in leg(made, floats[0], partial)] == [0, 0]
    differ, unexplained = leg(made, floats[0], whole)
    assert differ.value == unexplained.value == len(whole) - len(partial)
    assert "blk.1." in unexplained.detail
    assert "the bytes without a matrix" in unexplained.detail
    with pytest.raises(InputError, match=r"255 values for blk\.0\.attn_q\.weight, which has 256"):
        leg(made, floats[0], {"blk.0.attn_q.weight": np.ones(255, dtype=np.float32)})


def legacy_imatrix(path: Path, entries: dict[str, np.ndarray], calls: int = 3) -> Path:
    with path.open("wb") as stream:
        stream.write(struct.pack("<i", len(entries)))
        for name, values in entries.items():
            stream.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<2i", calls, len(values)))
            stream.write((values * np.float32(calls)).astype("<f4").tobytes())
        stream.write(struct.pack("<2i", 7, 3) + b"txt")
    return path


def gguf_imatrix(path: Path, entries: dict[str, np.ndarray], *, counts: bool = True, calls: float = 4.0) -> Path:
    writer = GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    for name, values in entries.items():
        writer.add_tensor(f"{name}.in_sum2", (values * np.float32(calls)).astype(np.float32))
        if counts:
            writer.add_tensor(f"{name}.counts", np.full(1, calls, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_both_forms_of_an_importance_matrix_are_read(tmp_path: Path) -> None:
    wanted = importance()
    for path in (legacy_imatrix(tmp_path / "i.dat", wanted, calls=4), gguf_imatrix(tmp_path / "i.gguf", wanted)):
        found = read_imatrix(path)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)  # 4 is a power of two: exact
    unused = gguf_imatrix(tmp_path / "u.gguf", wanted, calls=0.0)
    assert all((values == 1).all() for values in read_imatrix(unused).values())


def test_a_damaged_importance_matrix_is_refused(tmp_path: Path) -> None:
    good = legacy_imatrix(tmp_path / "i.dat", importance()).read_bytes()
    for data, message in (
        (good[:-3000], "truncated"),
        (struct.pack("<2i", 1, -5), "truncated"),
        (b"", "truncated"),
        (struct.pack("<i", 0), "states 0 entries"),
        (struct.pack("<2i", 1, 1) + b"a" + struct.pack("<2if", 1, 1, np.nan), "NaN"),
    ):
        (tmp_path / "x.dat").write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_imatrix(tmp_path / "x.dat")
    with pytest.raises(InputError, match="does not exist"):
        read_imatrix(tmp_path / "none")
    with pytest.raises(InputError, match="lacks its counts"):
        read_imatrix(gguf_imatrix(tmp_path / "c.gguf", importance(), counts=False))


def test_a_type_that_needs_an_importance_matrix_says_so(floats: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"IQ2_XXS can only be made with an importance matrix.*--imatrix"):
        quantise(floats[0], tmp_path / "x.gguf", "IQ2_XXS")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="session")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("middle-work"))


def test_the_intermediate_type_is_found_by_its_bytes(small_checkpoint: Path, middle: Oracle, tmp_path: Path) -> None:
    digest = sha256_path(small_checkpoint)
    for kind in ("F16", "BF16", "F32"):
        source = middle.converted(small_checkpoint, digest, kind)
        candidate = Candidate("Q8_0", read_gguf(quantise(source, tmp_path / f"{kind}.gguf", "Q8_0")))
        for mapped in (True, False):  # by principle, and by the conversions alone
            sources = Sources(Checkpoint(small_checkpoint)) if mapped else None
            found = inventory(sources.reference, candidate.file) if sources else Inventory({}, [], [], [])
            floats = middle.conversions(small_checkpoint, digest)
            results = Examination(candidate.file, sources, found, conversions=floats).run()
            check = quantise_checks(candidate, results, with_matrix=False)[0]
            assert check.value == 0
            assert f"from {kind}" in check.detail


def test_verify_takes_an_importance_matrix_and_binds_the_report_to_it(
    small_checkpoint: Path, middle: Oracle, tmp_path: Path
) -> None:
    """Given, it explains the file; not given, the file is refused and the way out named."""
    from verification import verify

    digest = sha256_path(small_checkpoint)
    source = middle.converted(small_checkpoint, digest, "F32")
    entries = {"blk.0.ffn_down.weight": (np.arange(64) % 5 + 1).astype(np.float32)}
    matrix = legacy_imatrix(tmp_path / "i.dat", entries)
    path = quantise(source, tmp_path / "q.gguf", "Q4_0", imatrix=read_imatrix(matrix))
    report = verify(small_checkpoint, [path], imatrix=matrix, chunks=2, n_ctx=64, threads=1, work_dir=middle.directory)
    check = next(check for leg in report.legs for check in leg.checks if check.name == "quantise.tensors_differ")
    assert (check.status, check.value, "from F32 with the imatrix" in check.detail) == ("pass", 0, True)
    assert [a.path for a in report.artefacts if a.role == "imatrix"] == [str(matrix)]
    candidate = read_gguf(path)
    candidate.metadata["quantize.imatrix.file"] = "mine.dat"  # llama-quantize writes this key
    floats = middle.conversions(small_checkpoint, digest)
    differ = weight_checks(Candidate("Q4_0", candidate), floats, Sources(Checkpoint(small_checkpoint))).quantise[0]
    assert differ.value == 1
    assert "importance matrix mine.dat" in differ.detail
