"""Every metadata key that llama.cpp reads, and what a change of it can change: one table.

Kinds of effect. *network*: sizes and arithmetic, so the logits. *tokens*: how text becomes ids, and where generation
ends. *template*: how a chat becomes text. *sampling*: the settings that llama.cpp's programs start with. *loading*: how
the file's bytes are read. *information*: shown, or listed by name and used by nothing. A key without a row is read by
no code of llama.cpp. `{arch}` stands for the file's own architecture; a key of another architecture is not read, and
which architecture reads which key is not told apart: a key that any of them reads counts.
A test holds the table against the names in the installed library. Sources: llama.cpp, src/llama-arch.cpp (names),
src/models and src/llama-vocab.cpp (readers), common/ (sampling, dflash), tools/mtmd/clip.cpp; gguf, constants.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["network", "tokens", "template", "sampling", "loading", "information"]


@dataclass(frozen=True)
class Effect:
    """What a key can change."""

    kind: Kind
    words: str


_SIZES = {
    "vocab_size": "number of tokens; by default the length of the token list",
    "context_length": "the context allocated by default, and RoPE's original length where no other is given",
    "embedding_length": "width of the hidden states",
    "embedding_length_out": "width of the output, where it is another",
    "embedding_length_per_layer_input": "width of the per-layer inputs",
    "features_length": "width of the input features (sound)",
    "block_count": "number of layers",
    "decoder_block_count": "number of the decoder's layers",
    "leading_dense_block_count": "first layers without experts",
    "feed_forward_length": "width of the feed-forward layers, one number or one a layer",
    "expert_feed_forward_length": "width of an expert",
    "expert_shared_feed_forward_length": "width of the shared expert",
    "expert_chunk_feed_forward_length": "width of a chunk expert",
    "expert_latent_length": "width of the experts' latent space",
    "moe_latent_size": "width of the experts' latent space",
    "convnext.block_count": "layers of the ConvNext part",
    "convnext.embedding_length": "width of the ConvNext part",
    "posnet.block_count": "layers of the PosNet part",
    "posnet.embedding_length": "width of the PosNet part",
    "dense_2_feat_in": "shape of the second dense layer behind the pooling",
    "dense_2_feat_out": "shape of the second dense layer behind the pooling",
    "dense_3_feat_in": "shape of the third dense layer behind the pooling",
    "dense_3_feat_out": "shape of the third dense layer behind the pooling",
    "target_hidden_size": "width of the model that a draft model reads",
    "block_size": "tokens that are filled in or drafted together",
}
_EXPERTS = {
    "expert_count": "number of experts",
    "expert_used_count": "experts that a token goes through",
    "expert_shared_count": "number of shared experts",
    "expert_group_count": "groups of experts",
    "expert_group_used_count": "groups that a token may choose from",
    "expert_group_scale": "scale of a group of experts",
    "experts_per_group": "experts in a group",
    "expert_weights_scale": "scale of the experts' sum",
    "expert_weights_norm": "whether the router's weights are made to sum to 1",
    "expert_gating_func": "the router's function: softmax, sigmoid or another",
    "interleave_moe_layer_step": "which layers have experts",
    "moe_every_n_layers": "which layers have experts",
    "router_logit_softcapping": "bound of the router's logits",
    "hash_layer_count": "layers whose experts are chosen by the token's id",
    "selector_rank": "rank of the selector of experts or layers",
    "selector_top_k": "how many the selector takes",
    "swiglu_clamp_exp": "bound inside the experts, one a layer",
    "swiglu_clamp_shexp": "bound inside the shared expert, one a layer",
    "nextn_predict_layers": "layers at the end that predict further tokens (MTP)",
}
_ATTENTION = {
    "head_count": "number of query heads",
    "head_count_kv": "number of key and value heads, one number or one a layer",
    "key_length": "channels of a key head",
    "value_length": "channels of a value head",
    "key_length_swa": "channels of a key head in windowed layers",
    "value_length_swa": "channels of a value head in windowed layers",
    "key_length_mla": "channels of a key head behind the latent",
    "value_length_mla": "channels of a value head behind the latent",
    "key_length_mla_swa": "the same in windowed layers",
    "value_length_mla_swa": "the same in windowed layers",
    "q_lora_rank": "rank of the query's latent",
    "kv_lora_rank": "rank of the latent of keys and values",
    "kv_lora_rank_swa": "the same in windowed layers",
    "output_lora_rank": "rank of the output projection",
    "output_group_count": "groups of the output projection",
    "decay_lora_rank": "rank of the decay (RWKV)",
    "iclr_lora_rank": "rank of the in-context learning rate (RWKV)",
    "value_residual_mix_lora_rank": "rank of the values' mix (RWKV)",
    "gate_lora_rank": "rank of the gate (RWKV)",
    "layer_norm_epsilon": "epsilon of the layer norms",
    "layer_norm_rms_epsilon": "epsilon of the RMS norms",
    "group_norm_epsilon": "epsilon of the group norms",
    "group_norm_groups": "groups of the group norms",
    "causal": "whether a position sees those behind it",
    "clamp_kqv": "bound of queries, keys and values",
    "max_alibi_bias": "slope of ALiBi",
    "scale": "scale of the attention's logits",
    "output_scale": "scale of the attention's output",
    "value_scale": "scale of the values",
    "temperature_length": "length from which the attention's temperature grows",
    "temperature_scale": "by how much it grows",
    "relative_buckets_count": "buckets of relative positions (T5)",
    "sliding_window": "tokens that a windowed layer sees",
    "sliding_window_pattern": "which layers are windowed",
    "shared_kv_layers": "last layers that use the keys and values of earlier ones",
    "recurrent_layers": "which layers are recurrent",
    "rope_pattern": "which layers have RoPE",
    "compress_ratios": "compression of keys and values, one a layer",
    "compress_rope_freq_base": "RoPE base of the compressed keys",
    "indexer.head_count": "heads of the index of sparse attention",
    "indexer.key_length": "channels of the index",
    "indexer.top_k": "positions that the index lets through",
    "indexer.types": "kind of the index, one a layer",
    "indexer.block_size": "positions in a block of the index",
    "indexer.local_blocks": "blocks nearby that are always seen",
    "indexer.kpool": "how keys are pooled for the index",
    "indexer.kpool_select_tail": "whether the last, unfinished block is seen",
}
_ROPE = {
    "dimension_count": "channels that are rotated",
    "dimension_count_swa": "channels that are rotated in windowed layers",
    "dimension_sections": "channels for each axis of a position (pictures, video)",
    "freq_base": "RoPE base; by default 10,000",
    "freq_base_swa": "RoPE base of windowed layers",
    "scale_linear": "linear scaling, as files of 2023 wrote it",
    "scaling.type": "kind of scaling: none, linear, yarn, longrope",
    "scaling.factor": "factor of the scaling",
    "scaling.alpha": "alpha of the scaling (Hunyuan)",
    "scaling.attn_factor": "scale of the attention under LongRoPE or YaRN",
    "scaling.original_context_length": "the length before scaling; LongRoPE's factors are chosen by it",
    "scaling.finetuned": "whether the model was trained with the scaling",
    "scaling.yarn_log_multiplier": "YaRN: growth of the attention's scale",
    "scaling.yarn_ext_factor": "YaRN: mix of extrapolation",
    "scaling.yarn_attn_factor": "YaRN: scale of the attention",
    "scaling.yarn_beta_fast": "YaRN: end of the fast frequencies",
    "scaling.yarn_beta_slow": "YaRN: end of the slow frequencies",
}
_ARITHMETIC = {
    "use_parallel_residual": "whether attention and feed-forward read the same input (GPT-NeoX)",
    "hidden_activation": "the feed-forward layers' activation",
    "activation.situ_beta": "shape of the activation",
    "activation.situ_linear_beta": "shape of the activation",
    "pooling_type": "what an embedding model gives: mean, first, last, a score",
    "classifier.output_labels": "names of a classifier's outputs, and their number",
    "classifier.pooling_type": "what a classifier reads: mean, first or last",
    "logit_scale": "scale of the logits",
    "embedding_scale": "scale of the embeddings",
    "residual_scale": "scale of the residual branches",
    "attn_logit_softcapping": "bound of the attention's logits",
    "final_logit_softcapping": "bound of the logits",
    "decoder_start_token_id": "the token that a decoder starts with (T5)",
    "swin_norm": "order of norm and attention (Chameleon)",
    "rescale_every_n_layers": "halving of the hidden states (RWKV)",
    "time_mix_extra_dim": "rank of the time mix (RWKV)",
    "time_decay_extra_dim": "rank of the decay (RWKV)",
    "token_shift_count": "tokens that are shifted (RWKV)",
    "wkv.head_size": "channels of a head (RWKV)",
    "full_attention_interval": "which layers have full attention",
    "n_deepstack_layers": "layers that pictures are added to",
    "deepstack_mapping": "layers that pictures are added to",
    "num_loops": "how often the layers are passed",
    "skip_loop_final_norm": "whether the norm between two passes is left out",
    "norm_before_fc": "order of norm and projection (draft models)",
    "norm_before_residual": "order of norm and residual (draft models)",
    "target_layers": "layers of the target that a draft model reads",
    "attn_res.block_size": "layers in a block of attention over residuals",
    "conv_kernel_size": "width of a convolution",
    "conv_group_size": "groups of a convolution",
    "shortconv.l_cache": "width of the short convolution",
    "ssm.conv_kernel": "width of the convolution before the state",
    "ssm.inner_size": "width inside the state-space layers",
    "ssm.state_size": "size of a state",
    "ssm.time_step_rank": "rank, or heads, of the time step",
    "ssm.group_count": "groups of the state",
    "ssm.dt_b_c_rms": "whether dt, B and C are normalised",
    "kda.head_dim": "channels of a head of the linear attention",
    "kda.gate_lower_bound": "smallest gate of the linear attention",
    "kda.safe_gate": "form of the gate of the linear attention",
    "hyper_connection.count": "parallel residual streams",
    "hyper_connection.epsilon": "epsilon of their mix",
    "hyper_connection.low_rank": "rank of their mix",
    "hyper_connection.magnitude": "size of their mix",
    "hyper_connection.sinkhorn_iterations": "steps of the normalisation of their mix",
    "hrm.h_cycles": "slow passes (HRM)",
    "hrm.l_cycles": "fast passes (HRM)",
    "hrm.layers_per_stack": "layers of a stack (HRM)",
    "hrm.prefix_lm": "whether the prompt is seen as a whole (HRM)",
    "ple.layers": "layers with inputs by n-gram",
    "ple.ngram_size": "longest n-gram",
    "ple.heads_per_ngram": "hashes of an n-gram",
    "ple.head_offsets": "first row of each hash",
    "ple.head_vocab_sizes": "rows of each hash",
    "ple.layer_multipliers": "multipliers of the hashes",
    "ple.conv_kernel": "width of the convolution behind them",
    "ple.eos_token_id": "the token at which n-grams end",
    "ple.image_token_id": "the token that stands for a picture",
    "adapters.count": "adapters inside the model",
    "adapters.lora_rank": "their rank",
    "adapters.router_gain": "gain of the choice between them",
    "adapters.token_ids_activate": "tokens that switch one on",
    "adapters.token_ids_substitute": "tokens that are read in their place",
}
_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "cls", "mask")
_FILLING = ("prefix", "suffix", "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
_TOKENS = {
    **{f"tokenizer.ggml.{name}_token_id": f"which token is {name.upper()}" for name in _IDS},
    **{f"tokenizer.ggml.{name}_token_id": "a token for filling in the middle" for name in _FILLING},
    "tokenizer.ggml.model": "kind of tokenizer",
    "tokenizer.ggml.pre": "how text is cut before merging; an unknown name is refused",
    "tokenizer.ggml.tokens": "text of every token",
    "tokenizer.ggml.token_type": "kind of every token: text, control, byte, unused",
    "tokenizer.ggml.token_type_count": "rows of the segment embedding (BERT)",
    "tokenizer.ggml.scores": "score of every token",
    "tokenizer.ggml.merges": "order of merges",
    "tokenizer.ggml.precompiled_charsmap": "normalisation of characters (T5)",
    "tokenizer.ggml.add_bos_token": "whether BOS is added to a text",
    "tokenizer.ggml.add_eos_token": "whether EOS is added to a text",
    "tokenizer.ggml.add_sep_token": "whether SEP is added to a text",
    "tokenizer.ggml.add_space_prefix": "whether a space is put before a text",
    "tokenizer.ggml.remove_extra_whitespaces": "whether runs of spaces become one",
    "tokenizer.ggml.normalizer.lowercase": "whether a text is lowered",
    "tokenizer.ggml.normalizer.strip_accents": "whether accents are dropped",
    "tokenizer.ggml.suppress_tokens": "tokens that are never generated",
}
_SAMPLED = (
    "sequence",
    "top_k",
    "top_p",
    "min_p",
    "xtc_probability",
    "xtc_threshold",
    "temp",
    "penalty_last_n",
    "penalty_repeat",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
)
_SHOWN = (
    "author",
    "basename",
    "description",
    "doi",
    "finetune",
    "languages",
    "license",
    "organization",
    "quantized_by",
    "repo_url",
    "size_label",
    "tags",
    "url",
    "uuid",
    "version",
    "source.url",
    "source.huggingface.repository",
)


def _of_architecture(prefix: str, rows: dict[str, str]) -> dict[str, Effect]:
    return {f"{{arch}}.{prefix}{name}": Effect("network", words) for name, words in rows.items()}


TABLE: dict[str, Effect] = {
    **_of_architecture("", _SIZES | _EXPERTS | _ARITHMETIC),
    **_of_architecture("attention.", _ATTENTION),
    **_of_architecture("rope.", _ROPE),
    **{f"xielu.{name}": Effect("network", "shape of the activation") for name in ("alpha_n", "alpha_p", "beta", "eps")},
    "general.tensor_extra.name": Effect("network", "tensors that are computed in another precision"),
    "general.tensor_extra.prec_a4": Effect("network", "precision of single tensors' inputs"),
    "diffusion.shift_logits": Effect("network", "whether a diffusion model's logits belong to the next position"),
    "dflash.block_size": Effect("network", "tokens that a draft model drafts together"),
    "dflash.sample_from_anchor": Effect("network", "where a draft model starts"),
    "adapter.type": Effect("loading", "kind of adapter"),
    "adapter.lora.alpha": Effect("network", "scale of a LoRA"),
    "adapter.alora.invocation_tokens": Effect("tokens", "tokens behind which an adapter is switched on"),
    "adapter.lora.task_name": Effect("information", "shown"),
    "adapter.lora.prompt_prefix": Effect("information", "shown; whoever serves the adapter may put it before a prompt"),
    **{key: Effect("tokens", words) for key, words in _TOKENS.items()},
    "tokenizer.chat_template": Effect("template", "how a chat becomes text"),
    "tokenizer.chat_template.{name}": Effect("template", "how a chat becomes text, where this template is asked for"),
    "tokenizer.chat_templates": Effect("information", "names of the templates"),
    "tokenizer.huggingface.json": Effect("information", "listed by name, used by nothing"),
    "tokenizer.rwkv.world": Effect("information", "listed by name, used by nothing"),
    **{
        f"general.sampling.{name}": Effect("sampling", "a setting that llama.cpp's programs start with")
        for name in _SAMPLED
    },
    "general.architecture": Effect("loading", "which network the file is"),
    "general.type": Effect("loading", "kind of file; by default a model"),
    "general.alignment": Effect("loading", "where tensors start; by default 32"),
    "split.no": Effect("loading", "number of the shard"),
    "split.count": Effect("loading", "number of shards"),
    "split.tensors.count": Effect("loading", "tensors in all shards"),
    "imatrix.chunk_count": Effect("loading", "chunks that an importance matrix was made from"),
    "imatrix.chunk_size": Effect("loading", "tokens of such a chunk"),
    "imatrix.datasets": Effect("information", "texts that an importance matrix was made from"),
    "general.name": Effect("information", "shown; a switch of Phi-3's tokens, which are compared by their ids"),
    "general.file_type": Effect("information", "shown; `promised_types` holds it to the tensors' types"),
    "general.quantization_version": Effect("information", "written with a quantised file"),
    **{f"general.{name}": Effect("information", "shown") for name in _SHOWN},
    "{arch}.tensor_data_layout": Effect("information", "listed by name, used by nothing"),
    **{
        f"quantize.imatrix.{name}": Effect("information", "which importance matrix the file was made with")
        for name in ("file", "dataset", "entries_count", "chunks_count")
    },
    "so8t.think_form": Effect("information", "tells `so8t serve` how the model writes its thinking; not llama.cpp's"),
}
# the same for every key behind a name
_FAMILIES = {
    "general.license.": Effect("information", "shown"),
    "general.source.": Effect("information", "shown"),
    "general.base_model.": Effect("information", "shown"),
    "general.dataset.": Effect("information", "shown"),
    "tokenizer.chat_template.": TABLE["tokenizer.chat_template.{name}"],
    "clip.": Effect("network", "the projector's network, and how pictures and sound are prepared for it"),
    "controlvector.": Effect("loading", "which model a control vector belongs to"),
}


def effect_of(key: str, architecture: str) -> Effect | None:
    """What a change of a key can change; None for a key that no code of llama.cpp reads.

    Args:
        architecture: the file's `general.architecture`.
    """
    if "{" in key:
        return None
    if key in TABLE:
        return TABLE[key]
    for family, effect in _FAMILIES.items():
        if key.startswith(family):
            return effect
    prefix, _, rest = key.partition(".")
    return TABLE.get(f"{{arch}}.{rest}") if prefix == architecture else None


def is_information(key: str) -> bool:
    """Whether no value of this key can change what the file computes."""
    effect = effect_of(key, "")
    return effect is not None and effect.kind == "information"
