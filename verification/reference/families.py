"""Model families whose transformation from checkpoint to GGUF is known here, and how they differ.

Names are GGUF architectures (`general.architecture`). Source: llama.cpp's converter.
"""

from __future__ import annotations

# architectures whose transformation from checkpoint to GGUF is known here; all others are compared with the oracle
KNOWN = frozenset({"llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3", "olmo2", "smollm3", "granite"})
PERMUTED = frozenset({"llama", "smollm3", "granite"})  # q and k rows are in pairs for RoPE on neighbours
NORM_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3"})  # the file stores an RMS norm's weight plus one
# parts of a multimodal checkpoint that a text model's GGUF file does not hold
OTHER_TOWERS = ("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "audio_tower.")
