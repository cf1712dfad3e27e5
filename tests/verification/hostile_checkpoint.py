"""Checkpoints that would run code: every way in leaves a trace file when it is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

MODULES = ("configuration_mine", "modeling_mine", "tokenization_mine", "pipeline_mine", "processing_mine", "setup")


def with_code(source: Path, target: Path, trace: Path) -> Path:
    """A copy of a checkpoint with code for config, model, tokenizer, pipeline and generation beside it."""
    shutil.copytree(source, target)
    code = f"from pathlib import Path\nPath({str(trace)!r}).write_text(__name__)\n"
    classes = "".join(f"class {name}:\n    pass\n" for name in ("MyConfig", "MyModel", "MyTokenizer", "MyPipeline"))
    for name in MODULES:
        (target / f"{name}.py").write_text(code + classes)
    (target / "custom_generate").mkdir()
    (target / "custom_generate" / "generate.py").write_text(code)
    edit(
        target / "config.json",
        auto_map={"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"},
        custom_pipelines={"text-generation": {"impl": "pipeline_mine.MyPipeline", "pt": ["AutoModelForCausalLM"]}},
        trust_remote_code=True,
    )
    tokenizer = {"AutoTokenizer": ["tokenization_mine.MyTokenizer", "tokenization_mine.MyTokenizer"]}
    edit(target / "tokenizer_config.json", auto_map=tokenizer, trust_remote_code=True)
    processor = {"auto_map": {"AutoProcessor": "processing_mine.MyTokenizer"}, "processor_class": "MyTokenizer"}
    (target / "processor_config.json").write_text(json.dumps(processor))
    (target / "preprocessor_config.json").write_text(json.dumps(processor))
    return target


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    value = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}), encoding="utf-8")
