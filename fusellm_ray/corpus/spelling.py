"""What the tokens of a `tokenizer.json` spell, and the same tokenizer with no way to its control tokens.

Three ways in which vocabularies write bytes, told apart by the decoder:

    byte-level     "Ġthe"    every byte is one of 256 printable characters (GPT-2, Llama-3, Qwen)
    SentencePiece  "▁the"    ▁ is a space, <0x0A> is a byte (Llama-2, Gemma, Mistral)
    plain          "the"     the token is its text
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fusellm_ray.errors import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNREACHABLE = "\ufdd0unreachable"


def _parts(tree: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """A section's components, nested sequences unrolled."""
    unrolled: list[dict[str, Any]] = []
    queue = [tree.get(section)]
    while queue:
        part = queue.pop(0)
        if part is not None and part["type"] == "Sequence":
            inner = part.get("decoders") or part.get("pretokenizers") or part.get("normalizers") or []
            queue = [*inner, *queue]
        elif part is not None:
            unrolled.append(part)
    return unrolled


def is_byte_level(tree: dict[str, Any]) -> bool:
    section = "decoder" if tree.get("decoder") is not None else "pre_tokenizer"
    return any(part["type"] == "ByteLevel" for part in _parts(tree, section))


def speller(name: str, tree: dict[str, Any]) -> Callable[[str], bytes]:
    """The function from a token's string to its bytes."""
    model = tree["model"]
    affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model["type"] == "WordPiece" or any(affixes):
        raise TokenizerError(
            f"{name}: a {model['type']} vocabulary with word affixes does not say where white space is; "
            "use a byte-level or SentencePiece tokenizer"
        )
    if is_byte_level(tree):
        byte_of = {char: byte for byte, char in enumerate(_byte_level_alphabet())}

        def spell_byte_level(token: str) -> bytes:
            try:
                return bytes([byte_of[char] for char in token])
            except KeyError:  # not written in the alphabet: such an entry can never come out of the model
                return token.encode()

        return spell_byte_level

    decoder, pre, normal = (_parts(tree, s) for s in ("decoder", "pre_tokenizer", "normalizer"))
    has_spaces = any(p["type"] == "Metaspace" for p in decoder + pre) or any(
        p["type"] == "Replace" and "▁" in (p.get("content"), p.get("pattern", {}).get("String"))
        for p in decoder + normal
    )
    has_byte_tokens = model.get("byte_fallback", False) or any(p["type"] == "ByteFallback" for p in decoder)

    def spell(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if has_byte_tokens else None
        if byte:
            return bytes([int(byte[1], 16)])
        return (token.replace("▁", " ") if has_spaces else token).encode()

    return spell


def _byte_level_alphabet() -> list[str]:
    """The character of each byte in GPT-2's alphabet: itself if printable, else from 256 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, spare = [], 256
    for byte in range(256):
        alphabet.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return alphabet


def prepended_token(hf: PreTrainedTokenizerFast, name: str) -> int | None:
    """The id that the tokenizer itself puts before a text, if any."""
    plain = hf("a", add_special_tokens=False)["input_ids"]
    full = hf("a", add_special_tokens=True)["input_ids"]
    begin = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    if begin > 1:
        raise TokenizerError(
            f"{name}: prepends {begin} special tokens ({hf.convert_ids_to_tokens(full[:begin])}); at most "
            "one can be aligned: change the tokenizer's post-processor"
        )
    return full[0] if begin else None


def special_tokens(
    hf: PreTrainedTokenizerFast, tree: dict[str, Any], vocabulary: dict[str, int]
) -> dict[str, int]:
    """Control tokens and the unknown token, with their ids.

    A token that merges can spell (a padding token "!") is text in a second role, and is not among them.
    """
    model = tree["model"]
    special = {token["content"] for token in tree["added_tokens"] if token["special"]}
    special |= {token for token in hf.all_special_tokens if token in vocabulary}
    if model["type"] == "BPE":
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        special -= {left + right for left, right in pairs if left + right in special}
        special -= {token for token in special if len(token) == 1 and token in model["vocab"]}
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    if unknown in vocabulary:
        special.add(unknown)
    return {token: vocabulary[token] for token in special}


def text_only(tree: dict[str, Any], special: dict[str, int]) -> Tokenizer:
    """The tokenizer without a way to control tokens, and with offsets untrimmed."""
    model = tree["model"]
    renamed = {token: token + _UNREACHABLE for token in special if token != model.get("unk_token")}
    if model["type"] == "Unigram":  # any entry may match the text
        vocab: Any = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    elif model["type"] != "BPE" or model.get("ignore_merges"):  # so may a whole word here
        vocab = {renamed.get(token, token): i for token, i in model["vocab"].items()}
    else:  # merges alone make tokens, and none makes these
        vocab, renamed = model["vocab"], {}
    added = [t | {"content": renamed.get(t["content"], t["content"])} for t in tree["added_tokens"]]
    model = model | {"vocab": vocab}
    if model["type"] == "BPE":
        model["dropout"] = None  # the same ids every time
    tree = tree | {"model": model, "added_tokens": added, "post_processor": None}
    rust = Tokenizer.from_str(json.dumps(tree))
    rust.encode_special_tokens = True
    return rust
