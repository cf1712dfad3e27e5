"""A rotation on any input, scaled and shuffled: healthy files pass; a fold left out, inverted or doubled is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from verification_models import rewrite

from so8t_core import SO8TConfig, attach, bake_checkpoint, save_adapter
from verification.engines.convert import convert
from verification.engines.huggingface import load_hf
from verification.fault_catalogue.models import save_model
from verification.gguf.reader import read_gguf
from verification.logit_parity.bake import bake_leg, transposed_control
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.compare import Examination, Sources, rotations
from verification.weight_parity.expected import inventory
from verification.weight_parity.hypotheses import (
    EXPECTED,
    TURNED_BACK,
    TWICE,
    UNROTATED,
    Known,
    hypotheses,
    rotated,
)

FORMS = {
    "shared": {"targets": "all-linear"},
    "scaled and shuffled": {"targets": "all-linear", "scale": "channel", "shuffle": True, "accumulate": True},
}


class Made:
    """base + adapter -> reference -> F16 file."""

    def __init__(self, root: Path, family: str, **form: object) -> None:
        self.base, self.adapter, self.reference = root / "base", root / "adapter", root / "reference"
        self.base = save_model(family, root / "base")
        model = attach(load_hf(self.base), SO8TConfig(**form))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_so8t." in name:
                    parameter.normal_(std=0.05, generator=generator)
        save_adapter(model, self.adapter)
        bake_checkpoint(self.base, self.adapter, self.reference)
        self.file = convert(self.reference, root / "m-F16.gguf", model_name=family)
        self.sources = Sources(Checkpoint(self.reference), Checkpoint(self.base), rotations(self.adapter))

    def examine(self, path: Path) -> dict[str, list[str]]:
        """Causes of findings by tensor."""
        file = read_gguf(path)
        results = Examination(file, self.sources, inventory(self.sources.reference, file)).run(1)
        return {result.name: [finding.cause for finding in result.findings] for result in results if result.findings}


@pytest.fixture(scope="module", params=["llama shared", "llama scaled and shuffled", "phi3 scaled and shuffled"])
def folded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family, _, form = request.param.partition(" ")
    return Made(tmp_path_factory.mktemp(request.param.replace(" ", "-")), family, **FORMS[form])


def test_a_healthy_file_has_no_findings_and_every_weight_its_rotation(folded: Made) -> None:
    assert folded.examine(folded.file) == {}
    linear = {name for name in folded.sources.reference if "_proj.weight" in name}
    assert set(folded.sources.rotations) == linear


def test_every_wrong_fold_of_every_target_is_named(folded: Made, tmp_path: Path) -> None:
    """All targets of one layer at once, each with another of the three faults."""
    file = read_gguf(folded.file)
    source_of = inventory(folded.sources.reference, file).source_of
    names = sorted(n for n in file.tensors if n.startswith("blk.1.") and source_of[n] in folded.sources.rotations)
    kinds = {UNROTATED: (True,), TURNED_BACK: (True, True), TWICE: (False,)}
    planted = {name: list(kinds)[number % 3] for number, name in enumerate(names)}

    def plant(name: str):
        # rows of q and k are permuted in the file; the fold acts on columns alone
        def change(values: np.ndarray) -> np.ndarray:
            W = values.astype(np.float32)
            for inverse in kinds[planted[name]]:
                W = rotated(W, folded.sources.rotations[source_of[name]], transposed=inverse)
            return W

        return change

    faulty = rewrite(folded.file, tmp_path / "faulty.gguf", tensors={name: plant(name) for name in names})
    found = folded.examine(faulty)
    assert set(found) == set(names)
    for name in names:
        assert set(found[name]) == {planted[name]}, name


def test_the_bake_leg_passes_and_its_control_fails(folded: Made) -> None:
    chunk = np.arange(32) % 64 + 3
    result = bake_leg(folded.base, folded.adapter, [chunk], max_abs_logit=1e-3)
    assert result.bake[0].value is not None
    assert result.bake[0].value < 1e-3
    control = transposed_control(folded.base, folded.adapter, chunk, result.gated, max_abs_logit=1e-3)
    assert control.value is not None
    assert control.value > 0.1


def test_a_readers_own_rotation_stands_beside_that_of_the_output() -> None:
    rng = np.random.default_rng(0)
    V = rng.standard_normal((16, 24)).astype(np.float32)
    R, out = (
        torch.from_numpy(np.stack([np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(blocks)]))
        for blocks in (3, 2)
    )
    found = dict(hypotheses(Known("v", V, rotation=out, own=R)))
    assert list(found) == [EXPECTED, UNROTATED, TURNED_BACK, TWICE, "rotated as well (R @ v_proj)"]
    Q = torch.block_diag(*R).numpy()
    assert np.abs(found[TWICE] - V @ Q).max() < 1e-6
    assert np.abs(found[UNROTATED] - V @ Q.T).max() < 1e-6
    assert np.abs(found["rotated as well (R @ v_proj)"] - torch.block_diag(*out).numpy() @ V).max() < 1e-6
