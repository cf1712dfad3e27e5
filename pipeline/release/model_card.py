"""Write the model card beside the GGUF files: the model's origin, how to run it, and where its report is."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pipeline.base_model import DEMO_LICENCE
from pipeline.config import DEMO_MODEL, RunConfig

UNKNOWN_LICENCE = "unknown"  # the hub's word
_UNKNOWN = (
    "**The licence is unknown**: the base names none in its model card. Set `convert.licence` to that of the base, "
    "if you know it, before you publish these files."
)
_HEADER = re.compile(r"---\r?\n(.*?\n)---\s*(\n|$)", re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")


def model_card(config: RunConfig, name: str, base_dir: Path, files: list[str], n_ctx: int, notes: list[str]) -> str:
    """Markdown with the hub's YAML header."""
    training = config.train
    lora = f"with LoRA (r {training.lora.r}, alpha {training.lora.alpha:g})" if training.lora else "without LoRA"
    every = training.targets == "all-linear"
    targets = "every linear layer" if every else ", ".join(f"`{target}`" for target in training.targets)
    licence = licence_of(config, base_dir)
    header = ["---", f"license: {licence}", "library_name: gguf", "tags: [so8t, gguf, think]", "---"]
    body = [
        f"# {name}",
        "",
        f"Base: `{config.model.base}`. An SO(8) rotation on the input of {targets} {lora}, {training.steps} optimiser "
        "steps on /think data (thinking first, answer last), folded into the ordinary weights: nothing of the adapter "
        "is left at inference.",
        "",
        *([_UNKNOWN, ""] if licence == UNKNOWN_LICENCE else []),
        "Files: " + ", ".join(f"`{file}`" for file in files) + ".",
        "",
        f"Run: `ollama create {name.lower()} -f Modelfile`, or any llama.cpp program with the file's own template. "
        f"Keep the context at {n_ctx} tokens or below.",
        "",
        "The thinking stands under the first heading of a reply, the answer under the second. Show users the answer."
        if config.data.think_form == "so8t"
        else "The thinking stands where the base model puts it, the answer behind it. Show users the answer.",
        "",
        "Training rows labelled as unsafe (NSFW, harmful) serve one purpose: to teach refusal. Rows with personal or "
        "confidential content that rules can find were excluded or masked; names of people are out of reach of rules.",
        "",
        "Whether these files are what was trained is measured, not promised: see `report/report.html` of the run that "
        "made them; it binds every number to the files' sha256. The run's `data/data_card.md` describes the data.",
    ]
    limits = [f"* {note}" for note in notes]
    return "\n".join([*header, "", *body, *(["", "Limits:", "", *limits] if limits else [])]) + "\n"


def licence_of(config: RunConfig, base_dir: Path) -> str:
    """The licence for the card: `convert.licence`, or the licence in the base's card, or "unknown"; never a guess."""
    if config.convert.licence is not None:
        return config.convert.licence
    if config.model.base == DEMO_MODEL:
        return DEMO_LICENCE
    try:
        header = _HEADER.match((base_dir / "README.md").read_text(encoding="utf-8"))
        fields = yaml.safe_load(header[1]) if header else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        fields = None
    said = fields.get("license") if isinstance(fields, dict) else None
    said = said[0] if isinstance(said, list) and len(said) == 1 else said
    return said if isinstance(said, str) and _IDENTIFIER.fullmatch(said) else UNKNOWN_LICENCE
