"""Logits and small reference files for the tests of this room."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verification.reference_file.format import ReferenceFile, Rows
from verification.reference_file.header import (
    ChatRecord,
    Header,
    Mode,
    PassageRecord,
    Place,
    TensorRecord,
    TextRecord,
    TokenizerRecord,
)


def logits_like_a_models(generator: np.random.Generator, rows: int, vocab: int) -> npt.NDArray[np.float32]:
    """(rows, vocab) logits with a few likely tokens and a long tail, of varied sharpness."""
    sharpness = generator.uniform(1.5, 5.0, (rows, 1))
    return (sharpness * generator.standard_normal((rows, vocab))).astype(np.float32)


def small_file() -> ReferenceFile:
    """A reference file of ten tokens, written out by hand: two chunks of eight tokens, one run mode, two tensors."""
    passages = [PassageRecord(length=8, first=4), PassageRecord(length=8, first=4)]
    header = Header(
        name="tiny",
        sha256="0" * 64,
        versions={"so8t": "1"},
        vocab=10,
        top=4,
        samples=2,
        sketch=2,
        n_ctx=8,
        text_sha256="1" * 64,
        passages=passages,
        groups={
            "corpus": [Place(passage=0, first=4), Place(passage=1, first=4)],
            "decode": [Place(passage=1, first=5)],
        },
        modes=[Mode(name="decode", title="Token by token", setting="the last 2", passages="decode", singly=2)],
        architecture="llama",
        metadata={"general.architecture": "llama", "llama.block_count": 1, "llama.rope.freq_base": 1e4},
        expected={"block_count": 1, "rope.freq_base": 1e4},
        tokenizer=TokenizerRecord(
            size=10,
            texts=[
                TextRecord(text="a", bare=[3], special=[1, 3]),
                TextRecord(text="東京", bare=[7, 8], special=[1, 7, 8]),
            ],
            special_ids={"bos": 1, "eos": 2, "unk": None, "pad": None},
            chat_template="{{ messages[0].content }}",
            stops=[2],
            strips_unicode_space=False,
        ),
        chats=[ChatRecord(name="user", messages=[{"role": "user", "content": "a"}], prompt=True, text="a", ids=[3])],
        tensors=[
            TensorRecord(name="token_embd.weight", shape=[10, 4], finite=True),
            TensorRecord(name="output_norm.weight", shape=[4], finite=True),
        ],
    )
    tokens = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2], dtype="<u4")
    # p = 1/2, 1/4, 1/8, 1/16 for four tokens, 1/16 for the other six together
    step = np.rint(np.arange(1, 5) * 65535 / 4)
    lowest = np.float32(4 * np.log(0.5))
    top = np.array([[3, 1, 7, 8], [2, 6, 4, 0], [5, 8, 1, 2], [4, 3, 2, 1], [9, 3, 0, 7], [2, 4, 6, 8]], dtype="<u2")
    targets = np.concatenate([tokens[5:8], tokens[13:16]])
    rank = [np.flatnonzero(row == target) for row, target in zip(top, targets, strict=True)]
    beside = np.log(1 / 16 / 6)
    rows = Rows(
        top_ids=top,
        top_codes=np.tile(step, (6, 1)).astype("<u2"),
        lowest=np.full(6, lowest, dtype="<f4"),
        tail_mass=np.full(6, np.log(1 / 16), dtype="<f4"),
        tail_entropy=np.full(6, np.log(6), dtype="<f4"),
        target=np.array([(r[0] + 1) * np.log(0.5) if len(r) else beside for r in rank], dtype="<f4"),
        tail_ids=np.array([[0, 2], [1, 3], [0, 9], [0, 9], [1, 1], [0, 9]], dtype="<u2"),
        tail_log_p=np.full((6, 2), beside, dtype="<f4"),
    )
    return ReferenceFile(
        header, tokens, rows, np.array([2, 1], dtype="<f4"), np.array([[1, -1], [0.5, 0.25]], dtype="<f4")
    )
