"""The meaning of each check of `lint`, and of each recognised kind of fault, for the person who runs the file.

One table by the name of the check, one by the code of the finding. The titles of the checks are in `checks` and `lint`.
"""

from __future__ import annotations

CHECKS = {
    # the file by itself
    "kind": (
        "The file is no language model but something that belongs to one, or a model for another task. What can be "
        "judged of it was; the line names the rest. That is no fault."
    ),
    "parts": (
        "The file lacks a part that it needs, or holds parts of two files, for example half of a LoRA's pair or a "
        "projector without a layer. Programs refuse it or compute nonsense."
    ),
    "loads": "llama.cpp refuses the file: nobody can run it. A tensor or a key is missing or has another shape.",
    "layout": (
        "Tensor data lies in a wrong place, or hidden bytes lie between or behind tensors. Programs may read "
        "wrong weights, and hidden bytes can carry anything. Do not run the file; convert it again."
    ),
    "counts": (
        "The file states a number twice, for example the number of heads or layers, and the two values disagree. "
        "Programs that use the wrong value crash or answer nonsense."
    ),
    "vocabulary": (
        "The lists of tokens do not fit together, or a special token lies outside the vocabulary. Text becomes "
        "wrong tokens, or the program ends while it reads a prompt."
    ),
    "finite_weights": "A weight is NaN or infinite. From this layer on every layer computes nonsense.",
    "saturated_weights": (
        "Weights have the largest value that F16 can hold: the conversion cut them off. Answers get worse or "
        "break. Convert to BF16 or F32 instead."
    ),
    "file_type": (
        "The name of the file promises a type that most of its weights do not have. Size and quality differ from "
        "the promise."
    ),
    "fallback_types": (
        "The promised type cannot hold rows of this width, so llama.cpp stored these tensors in a larger type. "
        "The file is somewhat larger than usual, never worse. You need to do nothing."
    ),
    "recipe": (
        "The file mixes types in another way than llama.cpp does by default. Many publishers do this on purpose. "
        "The file runs everywhere; only its size and quality differ from other files of this name."
    ),
    "local_paths": (
        "The file contains the path of a folder on its maker's computer, often with a user name. The path does not "
        "affect the model; the maker may want to remove it."
    ),
    "tokenises": (
        "With this file, llama.cpp ends the whole process while it tokenises certain texts. The prompt of a user "
        "could stop a server."
    ),
    "end_of_turn": (
        "llama.cpp does not stop at the end of an answer: the chat template closes the turn with a token that the "
        "file does not list as an end. The model talks to itself until the length limit."
    ),
    "template_powers": (
        "The chat template does more than format a chat: for example, it reacts to words in a message or contains "
        "a web address. Read it before you trust it: such a template can insert instructions."
    ),
    # the file against its reference
    "reference_files": (
        "The folder that you gave as the reference holds files or layers that do not belong to the model. The "
        "comparison left them out. Check that you gave the right folder."
    ),
    "inventory": (
        "A tensor of the reference is missing in the file, or the file has a tensor that nothing explains. The "
        "model in the file is not the trained model."
    ),
    "left_out": (
        "The reference also has parts for pictures, for sound or for the prediction of several tokens at once, and "
        "this file holds the text model without them. That is how such files are usually published."
    ),
    "weights": (
        "Weights differ from the reference by more than the rounding of their type. The file is damaged or comes "
        "from another model. Its answers differ, even if you do not see it at once."
    ),
    "hypotheses": (
        "An attention tensor is closer to a known mistake than to the reference: not merged, merged twice, "
        "transposed, permuted. The model answers, but differently from the trained model."
    ),
    "layer_outputs": (
        "The weights alone do not show whether a tensor is damaged or its quantiser corrected rounding errors. "
        "Lint gives no decision on these tensors; `so8t verify` decides."
    ),
    "other_maker": (
        "Another quantiser, build or importance matrix made these tensors. Their error is as small as the error of "
        "SO8T's quantiser. You need to do nothing."
    ),
    "flushed_weights": (
        "Some very small weights became zero. A few do no harm; many in one tensor can weaken the model. BF16 "
        "avoids this."
    ),
    "metadata": (
        "A key differs from the config.json of the model, for example a key for positions or norms. The model "
        "answers, but worse, often only in long texts. Convert again."
    ),
    "written_otherwise": (
        "Some keys of the tokenizer are written in another way than upstream's converter writes them today. llama.cpp "
        "does exactly the same with both, which was tried. Nothing has to be done."
    ),
    "unread_keys": (
        "The file has keys that upstream's converter does not write, or lacks some that it writes, and no code of "
        "llama.cpp reads them. Nothing changes when llama.cpp runs the file; another program may look at them."
    ),
    "oracle_metadata": (
        "The current converter of llama.cpp writes another value for this key. Convert again with a current "
        "converter, unless you want the difference."
    ),
    "sliding_window": (
        "The model reads only a limited window of earlier tokens; llama.cpp does not apply this window here. "
        "Answers agree within the window and differ in longer texts."
    ),
    "token_ids": (
        "Some texts become other tokens than in training, so the model does not read the text that the user wrote. "
        "Often only some languages, code or numbers are affected."
    ),
    "special_ids": (
        "A special token (start, end, padding) has another id than in training. Answers start badly or do not end."
    ),
    "added_specials": (
        "llama.cpp and transformers do not add the same start or end tokens to a prompt. A doubled or a missing "
        "start token makes many models clearly worse."
    ),
    "stop_set": "The reference stops at a token at which llama.cpp does not stop. Answers do not end.",
    "chat_template": (
        "The chat template of the file is missing or differs from the template of the reference. Programs that use "
        "it format chats in a way that the model never saw."
    ),
    "chat_render": (
        "llama.cpp's Python bindings and transformers format the same chat differently. The model sees a prompt "
        "that it was not trained on."
    ),
    "chat_token_ids": (
        "A whole chat becomes other tokens than in training, even if single texts become the same tokens. The model "
        "answers a prompt that it was not trained on."
    ),
}

CODES = {
    "flipped_bit": "One bit of the file is wrong, as after a bad copy or a bad disk. Download or copy it again.",
    "row_order": "The rows of a tensor are in another order than in the reference: the conversion mixed them up.",
    "head_rows": (
        "The rows of the attention heads were rearranged once too often or not at all, as a converter for another "
        "family would do it. Answers are nonsense."
    ),
    "f16_overflow": "Weights are larger than F16 can hold. Convert to BF16 or F32.",
    "rotation": (
        "The SO(8) rotation is missing, doubled, transposed, on the wrong side, or only partly applied. The file "
        "does not hold the trained model; bake again."
    ),
    "merge": (
        "The trained change was not merged, merged twice or scaled wrongly. The file answers like the base model, "
        "or like neither base nor trained model. Merge again."
    ),
    "transposed": "A tensor is stored with rows and columns exchanged. Answers are nonsense.",
    "unexplained_tensor": (
        "The file holds a tensor that nothing in the reference explains. It may change the answers, or only make "
        "the file larger. Convert again."
    ),
}


def explanation(check: str, code: str = "") -> str:
    """The meaning of a finding of this check, and of its kind if it was recognised.

    Raises:
        KeyError: a check or code without an explanation, which a test rules out.
    """
    return f"{CHECKS[check]} {CODES[code]}" if code else CHECKS[check]
