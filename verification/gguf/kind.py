"""The kind of a GGUF file, found from its keys and tensors: a language model, or another kind that people publish.

`general.type` is "model", "adapter", "imatrix" or "mmproj" in files of current tools; older files are recognised by
their architecture or by the names of their tensors. llama.cpp's pooling type says that a model gives vectors (1 mean,
2 first token, 3 last token) or a score (4) instead of the next token's logits.
Sources: gguf, constants.py (GGUFType, PoolingType, MODEL_ARCH_NAMES); llama.cpp, include/llama.h.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gguf.constants import MODEL_ARCH_NAMES

from so8t_core.errors import InputError
from verification.gguf.reader import GGUFFile

Name = Literal[
    "model",
    "embedding",
    "reranker",
    "diffusion",
    "vocabulary",
    "projector",
    "lora",
    "control_vector",
    "imatrix",
    "other",
]
POOLINGS = {1: "mean", 2: "first token", 3: "last token", 4: "score"}
# encoders: every position sees all others, so there is no next token
_ENCODERS = frozenset(
    [
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "eurobert",
        "gemma-embedding",
        "t5encoder",
        "llama-embed",
    ]
)
_MASKED = frozenset(("dream", "llada", "llada-moe", "rnd1"))  # text by diffusion: positions are filled in any order
_IN_LAYERS = re.compile(r"(blk|enc\.blk|dec\.blk)\.\d+\.|token_embd\.weight")  # a transformer as llama.cpp names it


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        noun: "a projector (mmproj) for images or sound", as it stands in a sentence.
        unjudged: the properties that `lint` cannot check in such a file; empty if `lint` checks all.
        has_logits: whether the file gives logits of a next token, which `verify`, `kld` and `serve` need.
        loads: whether llama.cpp loads such a file as a model.
    """

    name: Name
    noun: str
    unjudged: str = ""
    has_logits: bool = False
    loads: bool = False


_MODEL = Kind("model", "a language model", has_logits=True, loads=True)
MATRIX_UNJUDGED = "the model and the text that it was made with"
_WITH_ITS_MODEL = "whether it fits the model it belongs to, and what it computes"


def kind_of(file: GGUFFile) -> Kind:
    """The kind of a file; the file's name is not used."""
    names, said = file.tensors, file.metadata.get("general.type")
    arch = file.architecture
    if said == "mmproj" or arch == "clip":
        return Kind("projector", "a projector (mmproj) for images or sound", _WITH_ITS_MODEL)
    if arch == "controlvector" or (names and all(name.startswith("direction.") for name in names)):
        return Kind("control_vector", "a control vector", _WITH_ITS_MODEL)
    if said == "adapter" or (names and all(name.endswith((".lora_a", ".lora_b")) for name in names)):
        return Kind("lora", "a LoRA adapter", _WITH_ITS_MODEL)
    if said == "imatrix" or (names and all(name.endswith((".in_sum2", ".counts")) for name in names)):
        return Kind("imatrix", "an importance matrix", MATRIX_UNJUDGED)
    if not names and "tokenizer.ggml.model" in file.metadata:
        return Kind("vocabulary", "a vocabulary without weights", "a model: there is no weight in it")
    if arch == "wavtokenizer-dec":
        return Kind("other", "a decoder of sound (wavtokenizer-dec)", "the sound it makes", loads=True)
    if arch not in MODEL_ARCH_NAMES.values() and names and not any(_IN_LAYERS.match(name) for name in names):
        named = f"architecture {arch}" if arch else "no architecture"
        why = f"everything but layout and numbers: llama.cpp runs no file of {named}"
        return Kind("other", f"no language model ({named})", why)
    pooling = file.get("pooling_type")
    if pooling == 4 or any(name.startswith("cls.output") for name in names):
        return Kind("reranker", f"a reranker ({arch})", "its scores", loads=True)
    if arch in _ENCODERS or pooling:
        how = f", pooling: {POOLINGS[pooling]}" if pooling in POOLINGS else ""
        return Kind("embedding", f"an embedding model ({arch}{how})", "its vectors", loads=True)
    if arch in _MASKED:
        return Kind("diffusion", f"a diffusion language model ({arch})", "the text it makes", loads=True)
    return _MODEL


def require_logits(file: GGUFFile) -> None:
    """Refuse a file that gives no logits of a next token.

    Raises:
        InputError: the file is not a language model.
    """
    kind = kind_of(file)
    if not kind.has_logits:
        raise InputError(
            f"{file.path} is {kind.noun}, which has no logits of a next token; give the language model. `so8t lint` "
            "judges this file by itself"
        )
