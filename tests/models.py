"""Tiny random-weight models of real architectures, for tests that need a folder to load."""

from pathlib import Path

import torch
import transformers

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
_GATED = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
_GEMMA = {**_GATED, "head_dim": 8, "sliding_window": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

ARCHITECTURES = {
    "llama": lambda vocab: transformers.LlamaConfig(vocab_size=vocab, **_GATED),
    "llama_tied": lambda vocab: transformers.LlamaConfig(
        vocab_size=vocab, tie_word_embeddings=True, **_GATED
    ),
    "llama_wide": lambda vocab: transformers.LlamaConfig(
        vocab_size=vocab, **_GATED | {"num_attention_heads": 2, "num_key_value_heads": 1}
    ),
    "qwen2": lambda vocab: transformers.Qwen2Config(vocab_size=vocab, tie_word_embeddings=True, **_GATED),
    "mistral": lambda vocab: transformers.MistralConfig(vocab_size=vocab, sliding_window=8, **_GATED),
    "gemma3": lambda vocab: transformers.Gemma3TextConfig(
        vocab_size=vocab, layer_types=["sliding_attention", "full_attention"], **_GEMMA
    ),
    "gemma2": lambda vocab: transformers.Gemma2Config(vocab_size=vocab, **_GEMMA),
    "gpt_neox": lambda vocab: transformers.GPTNeoXConfig(vocab_size=vocab, intermediate_size=64, **_SMALL),
    "gpt2": lambda vocab: transformers.GPT2Config(vocab_size=vocab, **_GPT2),
    "falcon": lambda vocab: transformers.FalconConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "bloom": lambda vocab: transformers.BloomConfig(vocab_size=vocab, hidden_size=32, n_layer=2, n_head=4),
}


def tiny_model(architecture: str, vocab_size: int, folder: Path, seed: int = 0) -> Path:
    """Save a model of d = 32 with 2 layers and a context of 128 as safetensors, no tokenizer.

    Weights are drawn ten times wider than usual (0.2), so that attention matters to the output.
    """
    config = ARCHITECTURES[architecture](vocab_size)
    config.initializer_range = 0.2
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Path(folder)
