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

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from verification.gguf.reader import GGUFFile

# bytes of data; seconds of processor time (the tables of the IQ types take one); seconds on the clock; bytes of one
# file: two rows of each tensor of a model with 1,000 tensors of 16,384 columns are 64 MB
_LIMITS = Limits(memory=1 << 29, cpu=20.0, wall=300.0, files=1 << 28)


def preset_types(file: GGUFFile) -> list[dict[str, str]]:
    """Tensor name -> type, without and with an importance matrix for every tensor: a matrix changes some recipes.

    A recipe that llama.cpp does not have, or that the quantiser refuses or dies of, is left out.
    """
    from verification.gguf.admission import MAX_BLOCKS  # imported here: the child sets its limits first

    def is_size(key: str, value: object) -> bool:  # a list of sizes has one number for each block, or a few
        return key.startswith(f"{file.architecture}.") and not (isinstance(value, list) and len(value) > MAX_BLOCKS)

    question = {
        "do": "write",
        "architecture": file.architecture,
        "keys": {key: value for key, value in file.metadata.items() if is_size(key, value)},
        "shapes": {tensor.name: list(tensor.shape) for tensor in file.tensors.values()},
    }
    found: list[dict[str, str]] = []
    with (
        tempfile.TemporaryDirectory(prefix="so8t-recipe-") as scratch,
        Child(Path(__file__), _LIMITS, name="llama.cpp's quantiser") as child,
    ):
        try:
            child.ask({**question, "folder": scratch})
            for matrix in (False, True):
                found.append(child.ask({"do": "quantise", "type": file.file_type, "matrix": matrix})["types"])
        except ChildDied:
            pass
    return [types for types in found if types]


def add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key with the type that its Python type gives; integers are unsigned, an empty text or list is left out."""
    from gguf import GGUFValueType

    if value not in ("", []):
        kind = GGUFValueType.get_type(value)
        writer.add_key_value(key, value, GGUFValueType.UINT32 if kind is GGUFValueType.INT32 else kind)


class _Quantiser:
    """The code that runs in the child: one file with two rows of each tensor."""

    def __init__(self) -> None:
        self.thin, self.importance = Path(), dict[str, Any]()

    def answer(self, question: Message) -> Message:
        """Answer one question of `preset_types`."""
        return {"write": self.write, "quantise": self.quantise}[question["do"]](question)

    def write(self, question: Message) -> Message:
        """Write the file."""
        import numpy as np
        from gguf import GGUFWriter

        self.thin = Path(question["folder"]) / "thin.gguf"
        writer = GGUFWriter(self.thin, question["architecture"])
        writer.add_file_type(1)
        for key, value in question["keys"].items():
            add_key(writer, key, value)
        for name, whole in question["shapes"].items():
            shape = (*(min(2, size) for size in whole[:-1]), *whole[-1:])
            kind: type = np.float16 if len(shape) > 1 else np.float32
            writer.add_tensor(name, np.zeros(shape, dtype=kind))
            self.importance[name] = np.ones(math.prod(shape[:-2]) * shape[-1], dtype=np.float32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {}

    def quantise(self, question: Message) -> Message:
        """Each tensor's type in the quantised file; no types if llama.cpp refuses."""
        from so8t_core.errors import InputError
        from verification.engines.quantise import run_quantiser, type_number
        from verification.gguf.reader import read_gguf

        made = self.thin.with_name("made.gguf")
        try:
            run_quantiser(
                self.thin, made, type_number(question["type"]), 1, self.importance if question["matrix"] else {}
            )
        except InputError:
            return {"types": {}}
        return {"types": {name: tensor.type for name, tensor in read_gguf(made).tensors.items()}}


if __name__ == "__main__":
    serve(lambda: _Quantiser().answer)
