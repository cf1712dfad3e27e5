"""The type that llama.cpp's recipe for a file type gives each tensor: its quantiser is asked in a child process.

llama.cpp decides by names, row lengths and the model's sizes. So a file with the same keys and two rows of each tensor
is quantised, which takes milliseconds for any model. The keys are a stranger's: with some of them llama.cpp's quantiser
aborts (a model of 600 blocks), and this ends only the child. Source: llama.cpp, src/llama-quant.cpp.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as the child: import from the package's root, not from this folder
    sys.path[0] = sys.argv[2]

from verification.engines.child import Child, ChildDied, Limits, Message, serve
from verification.gguf.admission import MAX_BLOCKS

if TYPE_CHECKING:
    from verification.gguf.reader import GGUFFile

# bytes of data; seconds of processor time (the tables of the IQ types take one); seconds on the clock; bytes of one
# file: two rows of each tensor of a model with 1,000 tensors of 16,384 columns are 64 MB
_LIMITS = Limits(memory=1 << 29, cpu=20.0, wall=300.0, files=1 << 28)


def preset_types(file: GGUFFile) -> list[dict[str, str]]:
    """Tensor name -> type, without and with an importance matrix for every tensor: a matrix changes some recipes.

    A recipe that llama.cpp does not have, or that the quantiser refuses or dies of, is left out.
    """
    prefix = f"{file.architecture}."
    question = {
        "architecture": file.architecture,
        "keys": {key: value for key, value in file.metadata.items() if key.startswith(prefix) and _is_short(value)},
        "shapes": {tensor.name: list(tensor.shape) for tensor in file.tensors.values()},
        "type": file.file_type,
    }
    found: list[dict[str, str]] = []
    with (
        tempfile.TemporaryDirectory(prefix="so8t-recipe-") as scratch,
        Child(Path(__file__), _LIMITS, name="llama.cpp's quantiser") as child,
    ):
        try:
            for matrix in (False, True):
                found.append(child.ask({**question, "matrix": matrix, "folder": scratch})["types"])
        except ChildDied:
            pass
    return [types for types in found if types]


def _is_short(value: object) -> bool:
    """Whether a key can hold sizes of a model: a list has one number for each block, or a few."""
    return not isinstance(value, list) or len(value) <= MAX_BLOCKS


def answer(question: Message) -> Message:
    """Answer one question of `preset_types` in the child; no types if llama.cpp refuses."""
    import numpy as np
    from gguf import GGUFWriter

    from so8t_core.errors import InputError
    from verification.engines.quantise import run_quantiser, type_number
    from verification.gguf.reader import read_gguf

    thin, made = Path(question["folder"]) / "thin.gguf", Path(question["folder"]) / "made.gguf"
    writer = GGUFWriter(thin, question["architecture"])
    writer.add_file_type(1)
    for key, value in question["keys"].items():
        _add(writer, key, value)
    importance = {}
    for name, whole in question["shapes"].items():
        shape = (*(min(2, size) for size in whole[:-1]), *whole[-1:])
        kind: type = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(name, np.zeros(shape, dtype=kind))
        importance[name] = np.ones(math.prod(shape[:-2]) * shape[-1], dtype=np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        run_quantiser(thin, made, type_number(question["type"]), 1, importance if question["matrix"] else {})
    except InputError:
        return {"types": {}}
    return {"types": {name: tensor.type for name, tensor in read_gguf(made).tensors.items()}}


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key of the model's sizes to a GGUF file."""
    if isinstance(value, list):
        if value:
            writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))


if __name__ == "__main__":
    serve(lambda: answer)
