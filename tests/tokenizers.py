"""Tiny tokenizers of every family, each trained in about a second from the standard library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Kind = Literal["bytelevel", "llama", "metaspace", "unigram", "normalising"]
"""bytelevel: GPT-2's; llama: SentencePiece BPE with a prepending normaliser (Llama-2's) that adds BOS;
metaspace: SentencePiece BPE with a Metaspace pre-tokeniser; unigram: SentencePiece Unigram;
normalising: byte-level after NFKC and lowercasing."""
KINDS: tuple[Kind, ...] = get_args(Kind)

VOCAB_SIZE = 1200
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_FOREIGN = (
    "naïve café — Größe, façade. 今天天气很好,我们去公园。 これは日本語の文です。 Привет, мир! 😀👍🏽 αβγ\n"
)


def training_text() -> list[str]:
    """About 250 kB of English and Python code, and a few lines in other scripts."""
    library = Path(json.__file__).parent.parent
    names = ["pydoc_data/topics.py", "argparse.py", "json/decoder.py", "textwrap.py"]
    texts = [(library / name).read_text(encoding="utf-8")[:100_000] for name in names]
    return [line for text in texts for line in text.splitlines(keepends=True)] + [_FOREIGN] * 20


def build(kind: Kind, folder: Path) -> Path:
    """Train one tokenizer and save it in `folder` as transformers would; returns the folder."""
    if kind in ("bytelevel", "normalising"):
        fast = _byte_level(lowercase=kind == "normalising")
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    else:
        fast = _sentencepiece(kind)
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    hf.save_pretrained(folder)
    return folder


def _byte_level(lowercase: bool) -> Tokenizer:
    fast = Tokenizer(models.BPE())
    if lowercase:
        fast.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|fim|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(training_text(), trainer)
    return fast


def _sentencepiece(kind: Kind) -> Tokenizer:
    control = ["<unk>", "<s>", "</s>"]
    trainer: trainers.Trainer
    if kind == "unigram":
        fast = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[*control, *_BYTE_TOKENS],
            unk_token="<unk>",
            show_progress=False,
        )
    else:
        fast = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[*control, *_BYTE_TOKENS],
            limit_alphabet=120,  # leaves characters that only byte tokens can spell
            max_token_length=12,
            show_progress=False,
        )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    text = training_text()
    fast.train_from_iterator(text, trainer)
    if kind == "llama":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.pre_tokenizer = None  # type: ignore[assignment]
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", fast.token_to_id("<s>"))]
        )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_plain_byte_tokens(fast)


def _with_plain_byte_tokens(fast: Tokenizer) -> Tokenizer:
    """The trainer can add byte tokens only as special ones; in a real vocabulary they are ordinary."""
    tree: dict[str, Any] = json.loads(fast.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in _BYTE_TOKENS]
    tree["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(tree))
