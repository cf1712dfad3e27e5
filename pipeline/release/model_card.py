"""The model card beside the GGUF files: what it was made from, how, how to run it, and where its proof lies."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import RunConfig


def model_card(config: RunConfig, name: str, base_dir: Path, files: list[str], n_ctx: int, notes: list[str]) -> str:
    """Markdown with the hub's YAML header."""
    training = config.train
    lora = f"with LoRA (r {training.lora.r}, alpha {training.lora.alpha:g})" if training.lora else "without LoRA"
    licence = _licence(base_dir)
    header = ["---", f"license: {licence}", "library_name: gguf", "tags: [so8t, gguf, think]", "---"]
    body = [
        f"# {name}",
        "",
        f"Base: `{config.model.base}`. An SO(8) rotation on the input of `o_proj` {lora}, {training.steps} optimiser "
        "steps on /think data (thinking first, answer last), folded into the ordinary weights: nothing of the adapter "
        "is left at inference.",
        "",
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


def _licence(base_dir: Path) -> str:
    """The base's licence where it says one; SmolLM2 is Apache-2.0, Phi-3.5 MIT."""
    text = (base_dir / "README.md").read_text(encoding="utf-8") if (base_dir / "README.md").is_file() else ""
    for line in text.splitlines()[:40]:
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    kind = json.loads((base_dir / "config.json").read_text(encoding="utf-8")).get("model_type")
    return {"phi3": "mit"}.get(kind, "apache-2.0" if "SmolLM2" in (base_dir / "config.json").read_text() else "other")
