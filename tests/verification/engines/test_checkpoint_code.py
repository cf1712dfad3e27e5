"""A checkpoint's code is never run: not by lint, verify, convert, the oracle, nor by upstream's converter."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_checkpoint import edit, with_code
from verification_models import Family

from so8t_core import InputError, bake_checkpoint
from so8t_core.files import sha256_path
from verification import verify
from verification.commands.lint import lint
from verification.engines.convert import convert, convert_metadata
from verification.engines.converter_input import converter_input
from verification.engines.huggingface import load_hf
from verification.engines.program_digests import SCRIPT
from verification.engines.reconversion import Oracle
from verification.gguf.reader import read_gguf
from verification.reference.tokenizer import load_tokenizer


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.fixture
def hostile(family: Family, tmp_path: Path, trace: Path) -> Path:
    """The reference with code of its own, under its own name."""
    return with_code(family.reference, tmp_path / "hostile" / family.reference.name, trace)


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """A converter that only says that it was started."""
    home = tmp_path / "watched"
    home.mkdir()
    (home / SCRIPT).write_text(
        f"from pathlib import Path\nPath({str(home / 'started')!r}).touch()\nraise SystemExit('started')\n"
    )
    return home


@pytest.mark.usefixtures("cold_converter")
def test_a_known_family_is_converted_from_its_data_alone(
    family: Family, hostile: Path, tmp_path: Path, trace: Path
) -> None:
    """The same bytes as without the code; the whole lint of the file finds nothing."""
    made = convert(hostile, tmp_path / "m.gguf", model_name="tiny")
    assert made.read_bytes() == family.files["F16"].read_bytes()
    assert lint(made, reference=hostile).verdict == "pass"
    assert not trace.exists()


def test_verify_and_its_oracle_run_no_code_of_the_reference(
    family: Family, hostile: Path, tmp_path: Path, trace: Path
) -> None:
    report = verify(hostile, [family.files["F16"]], chunks=2, n_ctx=64, work_dir=tmp_path / "work")
    assert report.verdict != "incomplete"  # measured to its end; two short chunks may leave it inconclusive
    assert not trace.exists()


def test_in_this_process_neither_tokenizer_nor_model_runs_code(hostile: Path, trace: Path) -> None:
    """transformers' own classes are taken, and nobody is asked on the terminal."""
    assert load_tokenizer(hostile).encode("a")
    assert type(load_hf(hostile)).__module__.startswith("transformers.")
    assert not trace.exists()
    assert "tokenization_mine" not in " ".join(sys.modules)


def unknown_family(directory: Path) -> None:
    edit(directory / "config.json", model_type="mine", architectures=["MyModel"])


def unknown_family_in_the_config_alone(directory: Path) -> None:
    unknown_family(directory)
    edit(directory / "tokenizer_config.json", auto_map=None)


def code_on_the_hub(directory: Path) -> None:
    unknown_family(directory)
    edit(directory / "config.json", auto_map={"AutoConfig": "someone/else--configuration_mine.MyConfig"})


def unknown_tokenizer(directory: Path) -> None:
    unknown_family(directory)
    edit(directory / "config.json", auto_map=None)
    edit(directory / "tokenizer_config.json", tokenizer_class="MyTokenizer")


def kernel_from_the_hub(directory: Path) -> None:
    edit(directory / "config.json", auto_map=None, attn_implementation="someone/attention@main:kernel")


def nested_kernel(directory: Path) -> None:
    edit(directory / "config.json", text_config={"_attn_implementation_internal": {"": "someone/attention"}})


def adapter_beside(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')


def pickles_alone(directory: Path) -> None:
    trace = directory.parent.parent / "trace"

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return Path.touch, (trace,)

    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))


def pickle_in_the_index(directory: Path) -> None:
    pickles_alone(directory)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSED = {
    unknown_family: "needs Python code of its own .*'mine'",
    unknown_family_in_the_config_alone: "needs Python code of its own",
    code_on_the_hub: "someone/else--configuration_mine",
    unknown_tokenizer: "tokenizer_config.json needs Python code of its own",
    kernel_from_the_hub: "names a kernel to be fetched",
    nested_kernel: "names a kernel to be fetched",
    adapter_beside: "holds adapter_config.json beside the model",
    pickles_alone: "never unpickled",
    pickle_in_the_index: r"only \*.safetensors files are read",
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_needs_code_is_refused_before_the_converter_starts(
    family: Family,
    hostile: Path,
    watched: Path,
    tmp_path: Path,
    trace: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(hostile)
    candidate, out = family.files["F16"], tmp_path / "out.gguf"
    calls: list[Callable[[], object]] = [
        lambda: convert(hostile, out, converter=watched),
        lambda: convert_metadata(hostile, out, converter=watched),
        lambda: Oracle(tmp_path / "work", converter=watched).converted(hostile, sha256_path(hostile)),
        lambda: lint(candidate, reference=hostile, converter=watched),
        lambda: verify(hostile, [candidate], chunks=2, n_ctx=64, converter=watched),
        lambda: bake_checkpoint(hostile, family.adapter, tmp_path / "baked"),
        lambda: load_hf(hostile),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message) as refusal:
            call()
        assert len(str(refusal.value).splitlines()) == 1
    assert not (watched / "started").exists()
    assert not trace.exists()
    assert not out.exists()


def test_the_converter_gets_data_and_the_models_own_weights_alone(hostile: Path, trace: Path) -> None:
    shutil.copy(hostile / "model.safetensors", hostile / "model-00002-of-00002.safetensors")
    stale = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (hostile / "model.safetensors.index.json").write_text(json.dumps(stale))
    (hostile / "tokenizer.pkl").write_bytes(b"x")
    text = (hostile / "config.json").read_text()
    (hostile / "config.json").write_text(text.replace('"auto_map"', '"auto\\u005fmap"'))
    with converter_input(hostile) as (given, weights, notes):
        names = {path.relative_to(given).as_posix() for path in given.rglob("*") if path.is_file()}
        texts = " ".join(json.dumps(json.loads((given / name).read_text())) for name in names if "config.json" in name)
        assert given.name == hostile.name
    assert {name for name in names if name.endswith((".safetensors", ".index.json"))} == {"model.safetensors"}
    assert not [name for name in names if name.endswith((".py", ".pkl", ".bin"))]
    assert not [word for word in ("auto_map", "custom_pipelines", "_mine") if word in texts]
    assert weights.names == ("model.safetensors",)
    assert any("model-00002-of-00002" in note for note in notes)


def test_the_converter_sees_no_credentials_and_no_modules_of_the_working_directory(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / SCRIPT).write_text(
        "import json, os, sys\nsys.exit(json.dumps({'env': dict(os.environ), 'path': sys.path}))", encoding="utf-8"
    )
    monkeypatch.setenv("HF_TOKEN", "secret-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-2")
    monkeypatch.setenv("PYTHONSTARTUP", "evil.py")
    monkeypatch.setenv("PYTHONPATH", f":.:relative:{tmp_path / 'unrelated'}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as failure:
        convert(family.reference, tmp_path / "x.gguf", converter=tmp_path)
    said = str(failure.value)
    assert '"HF_HUB_OFFLINE": "1"' in said
    assert not [word for word in ("secret", "evil", "relative", "unrelated") if word in said]
    assert '""' not in said.partition('"path"')[2]


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"\n\x0f\n\x05<unk>\x15"])
def test_an_odd_sentencepiece_model_is_an_error_of_one_line(family: Family, tmp_path: Path, data: bytes) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(family.reference, odd)
    (odd / "tokenizer.json").unlink()
    (odd / "tokenizer.model").write_bytes(data)
    edit(odd / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(InputError) as refusal:
        convert_metadata(odd, tmp_path / "x.gguf")
    assert len(str(refusal.value).splitlines()) == 1
    with contextlib.suppress(InputError):  # transformers makes an empty tokenizer of some of these
        load_tokenizer(odd)


def test_no_local_path_reaches_the_file(family: Family, tmp_path: Path) -> None:
    """config.json and model card may name where a base lay; the file names a model at most."""
    private = tmp_path / "secret-customer" / "phase-two"
    shutil.copytree(family.reference, private)
    edit(private / "config.json", _name_or_path=str(tmp_path / "secret-customer" / "base"))
    header = (
        f"license: mit\nbase_model:\n- {tmp_path}/secret-customer/base\n- ./secret-customer/other\n- org/Known-1B\n"
        f"datasets: ['~/secret-customer/rows', org/rows]\nsource_url: file:///secret-customer/x\n"
        f"repo_url: {tmp_path}/secret-customer/repo\ntags: [chat]\n"
    )
    (private / "README.md").write_text(f"---\n{header}---\n# A model\n", encoding="utf-8")
    file = read_gguf(convert(private, tmp_path / "m.gguf", model_name="tiny"))
    texts = {key: str(value) for key, value in file.metadata.items() if not key.startswith("tokenizer.ggml")}
    assert not {key: text for key, text in texts.items() if "secret-customer" in text or str(tmp_path) in text}
    assert not {key: text for key, text in texts.items() if key.startswith("general.") and text.startswith(("/", "~"))}
    assert texts["general.license"] == "mit"
    assert "https://huggingface.co/org/Known-1B" in texts.values()
