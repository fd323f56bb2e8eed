"""Tokenizers of four kinds, trained on the text of a domain.

    byte_level      byte-level BPE with GPT-2's pattern ("Ġthe")
    sentencepiece   BPE with ▁ for a space, a space added before the text, <0x0A> for other bytes (Llama-2)
    unigram         Unigram pieces with ▁ and byte fallback; indentation is one token
    digits          byte-level BPE with another pattern: every digit alone, runs of spaces kept whole

All prepend <s> of their own accord, and end documents with </s>.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TokenizerKind = Literal["byte_level", "sentencepiece", "unigram", "digits"]

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_CODE_PATTERN = r"\n+|▁+(?=▁)|▁?[\p{L}_]+|▁?\p{N}+|▁?[^▁\s\p{L}\p{N}_]+|▁+|\s+"
"""Splits <0x0A> where a text spells it out, so that no text passes for a byte token."""
_WORD_PATTERN = r" ?[\p{L}]+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+| +(?= )|\s+"
_BYTE_SCORE_GAP = 10.0
"""How far a byte token's log-probability lies under the least probable piece's."""


def train_tokenizer(
    kind: TokenizerKind, texts: Iterable[str], vocab_size: int, max_context: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of one kind; at most `vocab_size` entries."""
    train = {
        "byte_level": _train_byte_level,
        "digits": _train_byte_level,
        "sentencepiece": _train_sentencepiece,
        "unigram": _train_unigram,
    }[kind]
    tokenizer = train(kind, texts, vocab_size)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    has_unknown = tokenizer.token_to_id(UNKNOWN) is not None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN if has_unknown else None,
        model_max_length=max_context,
        clean_up_tokenization_spaces=False,
    )


def _train_byte_level(kind: TokenizerKind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORD_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_sentencepiece(kind: TokenizerKind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN, BOS, EOS, *_BYTES],
        limit_alphabet=128,
        show_progress=False,
    )
    # As in SentencePiece, a newline is no character of the vocabulary but a byte.
    tokenizer.train_from_iterator((" ".join(text.split()) for text in texts), trainer)
    return _with_byte_tokens(tokenizer)


def _train_unigram(kind: TokenizerKind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_CODE_PATTERN), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(_BYTES),
        special_tokens=[UNKNOWN, BOS, EOS],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_byte_tokens(tokenizer)


def _with_byte_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens as entries of the vocabulary that only the fallback produces, not as special tokens."""
    tree: dict[str, Any] = json.loads(tokenizer.to_str())
    model = tree["model"]
    if model["type"] == "Unigram":
        roles, pieces = model["vocab"][:3], model["vocab"][3:]
        least = min(score for _, score in pieces) - _BYTE_SCORE_GAP
        model["vocab"] = roles + [[byte, least] for byte in _BYTES] + pieces
        model["byte_fallback"] = True
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in _BYTES]
    return Tokenizer.from_str(json.dumps(tree))
