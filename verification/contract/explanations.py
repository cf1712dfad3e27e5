"""What each check of `lint`, and each recognised kind of fault, means for the person who runs the file.

One table by the check's name and one by the finding's code; the titles of the checks stand in `checks` and `lint`.
"""

from __future__ import annotations

CHECKS = {
    # the file by itself
    "loads": "llama.cpp refuses the file: nobody can run it. A tensor or a key is missing or has another shape.",
    "layout": (
        "Tensor data lies where it should not, or bytes lie hidden between or behind tensors. Programs may read "
        "wrong weights, and hidden bytes can carry anything. Do not run the file before it was converted again."
    ),
    "counts": (
        "The file states a number twice and the two disagree, for example heads or layers. Programs that believe "
        "the other number crash or answer nonsense."
    ),
    "vocabulary": (
        "The lists of tokens do not fit together, or a special token lies outside the vocabulary. Text becomes "
        "wrong tokens, or the program ends while it reads a prompt."
    ),
    "finite_weights": "A weight is no number (NaN or infinite). From that layer on every answer is nonsense.",
    "saturated_weights": (
        "Weights sit at the largest number that F16 can hold: they were cut off. Answers get worse or break. "
        "Convert to BF16 or F32 instead."
    ),
    "file_type": (
        "The file is named after a type that most of its weights do not have. Size and quality are not what its "
        "name promises."
    ),
    "fallback_types": (
        "The promised type cannot hold rows of this width, so llama.cpp stored these tensors in a larger type. "
        "The file is somewhat larger than usual, never worse. Nothing has to be done."
    ),
    "recipe": (
        "The file mixes types in another way than llama.cpp does by default, which many publishers do on purpose."
        " It runs everywhere; only its size and quality differ from other files of this name."
    ),
    "local_paths": (
        "The file publishes a folder of its maker's computer, often with a user name. It runs as well as without;"
        " the maker may want to remove the path."
    ),
    "tokenises": (
        "llama.cpp ends the whole process while it tokenises some text with this file. A user's prompt could stop"
        " a server."
    ),
    "end_of_turn": (
        "At the end of an answer llama.cpp goes on writing: the chat template closes the turn with a token that "
        "the file does not list as an end. The model talks to itself until the length limit."
    ),
    "template_powers": (
        "The chat template does more than lay out a chat, for example it reacts to words in a message or holds a "
        "web address. Read it before you trust it: such a template can insert instructions."
    ),
    # the file against its reference
    "reference_files": (
        "The folder given as the reference holds files or layers that are no part of the model. The comparison "
        "left them out; see whether it is the folder that was meant."
    ),
    "inventory": (
        "A tensor of the reference is missing in the file, or the file has one that nothing explains. The model "
        "that runs is not the model that was trained."
    ),
    "weights": (
        "Weights are further from the reference than their type's rounding. The file is damaged or of another "
        "model, and its answers differ, visibly or not."
    ),
    "hypotheses": (
        "An attention tensor is closer to a known mistake than to the reference: not merged, merged twice, "
        "transposed, permuted. The model answers, but not as it was trained."
    ),
    "layer_outputs": (
        "The weights alone cannot tell damage from a quantiser that corrects its own errors. Lint leaves these "
        "tensors open; `so8t verify` decides them."
    ),
    "other_maker": (
        "Another quantiser, build or importance matrix made these tensors. Their error is as small as our own "
        "quantiser's. Nothing has to be done."
    ),
    "flushed_weights": (
        "Some very small weights became zero. Single ones do no harm; many in one tensor can weaken it, which "
        "BF16 avoids."
    ),
    "metadata": (
        "A key says something else than the model's config.json, for example about positions or norms. The model "
        "answers, but worse, often only in long texts. Convert again."
    ),
    "oracle_metadata": (
        "A key differs from what upstream's converter writes today. Convert again with a current converter, "
        "unless the difference is wanted."
    ),
    "sliding_window": (
        "The model looks back over a limited window that llama.cpp does not apply here. Answers agree within that"
        " window and drift apart beyond it."
    ),
    "token_ids": (
        "Some text becomes other tokens than in training. The model reads something else than the user wrote; "
        "often only other languages, code or numbers suffer."
    ),
    "special_ids": (
        "A special token (start, end, padding) has another number than in training. Answers start badly or do not end."
    ),
    "added_specials": (
        "Start or end tokens are added to a prompt on one side only. A doubled or a missing start token makes "
        "many models noticeably worse."
    ),
    "stop_set": "The reference stops at a token at which llama.cpp goes on. Answers do not end.",
    "chat_template": (
        "The file's chat template is missing or another one than the reference's. Programs that use it lay out "
        "chats as the model never saw them."
    ),
    "chat_render": (
        "llama.cpp's bindings lay out a chat in other characters than transformers does. The model sees a prompt "
        "that it was not trained on."
    ),
    "chat_token_ids": (
        "A whole chat becomes other tokens than in training, although single texts may not. The model answers a "
        "prompt that it was not trained on."
    ),
}

CODES = {
    "flipped_bit": "One bit of the file is wrong, as after a bad copy or a bad disk. Download or copy it again.",
    "row_order": "The rows of a tensor stand in another order than the reference's: the conversion mixed them up.",
    "head_rows": (
        "The rows of the attention heads were rearranged once too often or not at all, as by a converter for "
        "another family. Answers are nonsense."
    ),
    "f16_overflow": "Weights are larger than F16 can hold. Convert to BF16 or F32.",
    "rotation": (
        "The SO(8) rotation is missing, doubled, transposed, on the wrong side, or partly left. The file is not "
        "what was trained; bake again."
    ),
    "merge": (
        "The trained change was not merged, merged twice or scaled wrongly. The file answers like the base model,"
        " or like neither; merge again."
    ),
    "transposed": "A tensor is stored with rows and columns exchanged. Answers are nonsense.",
    "unexplained_tensor": (
        "The file holds a tensor that nothing in the reference explains. It may change answers, or be dead "
        "weight; convert again."
    ),
}


def explanation(check: str, code: str = "") -> str:
    """What a check's finding means, and its kind where it was recognised.

    Raises:
        KeyError: a check or code without an explanation, which a test rules out.
    """
    return f"{CHECKS[check]} {CODES[code]}" if code else CHECKS[check]
