from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fusellm_ray.config import ModelConfig, TeacherConfig
from fusellm_ray.corpus.tokens import ByteTokenizer, Encoding
from fusellm_ray.errors import TokenizerError
from tests.tokenizers import KINDS

SHARED = ("llama2", "gpt-neox", "qwen3", "smollm2")
SHARED_ROOT = Path(__file__).parents[2] / "shared" / "assets" / "tokenizers"
TEXTS = {
    "empty": "",
    "english": "The quick brown fox — it's 42 years old!  Two spaces,\ttabs, and a line end.\n",
    "code": "def f(x):\n    if x:\n        return {'a': [1, 2.5e-3]}  # ünïcode\n\n\nclass A: ...\r\n",
    "chinese": "今天天气很好,我们去公园散步。他说:“这是真的吗?”",
    "emoji": "😀👍🏽 👨‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "spaces": "   leading, trailing   ",
    "markers": "▁▁ x ▁ Ġ Ċ <0x0A> <0xE4>",
    "control": "</s><s> <unk> <|endoftext|><|im_end|> <|fim|>",
    "decomposed": "cafe\u0301 e\u0301 \u1100\u1161\u11a8 a\u0301\u0323 Ⅷ ﷺ ﬁ",
    "latin1": bytes(range(256)).decode("latin-1"),
}


@functools.cache
def load(folder: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(folder))


@pytest.fixture(params=[*KINDS, *SHARED])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folders: dict[str, Path]) -> ByteTokenizer:
    if request.param in tokenizer_folders:
        return load(tokenizer_folders[request.param])
    folder = SHARED_ROOT / request.param
    if not folder.is_dir():
        pytest.skip(f"no tokenizer of a well-known model at {folder}")
    return load(folder)


def check_tiling(encoding: Encoding, text: str) -> None:
    assert encoding.ids.dtype == encoding.ends.dtype == np.int32
    assert len(encoding.ids) == len(encoding.ends)
    assert (np.diff(encoding.ends, prepend=0) >= 0).all()
    assert (encoding.ends[-1] if len(encoding.ends) else 0) == len(text.encode())


def mismatched(tokenizer: ByteTokenizer, text: str) -> list[tuple[bytes | None, bytes]]:
    """Tokens that spell other bytes than those they cover."""
    encoding, data = tokenizer.encode(text), text.encode()
    starts = [0, *encoding.ends[:-1]]
    pairs = [
        (tokenizer.token_bytes[i], data[a:b])
        for i, a, b in zip(encoding.ids, starts, encoding.ends, strict=True)
    ]
    return [(spelled, covered) for spelled, covered in pairs if spelled != covered]


def byte_level(**changes: object) -> transformers.PreTrainedTokenizerFast:
    """Byte-level tokenizer over single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(fast, name, value)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>")


# ------------------------------------------------------------------------------------------- offsets


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_ends_cover_every_byte_in_order(tokenizer: ByteTokenizer, text: str) -> None:
    check_tiling(tokenizer.encode(text), text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])) | st.binary().map(lambda b: b.decode("latin-1"))
)
def test_ends_cover_every_byte_of_any_text(tokenizer: ByteTokenizer, text: str) -> None:
    try:
        encoding = tokenizer.encode(text)
    except TokenizerError:  # nothing but characters that the tokenizer drops
        assert not tokenizer.hf(text, add_special_tokens=False)["input_ids"]
    else:
        check_tiling(encoding, text)


@pytest.mark.parametrize("kind", ["bytelevel", "llama", "metaspace", "unigram"])
@pytest.mark.parametrize("name", ["english", "code", "chinese", "emoji", "latin1", "decomposed"])
def test_tokens_cover_the_bytes_they_spell(tokenizer_folders: dict[str, Path], kind: str, name: str) -> None:
    tokenizer = load(tokenizer_folders[kind])
    wrong = mismatched(tokenizer, TEXTS[name])
    if tokenizer.strips_leading_space:  # but for the space before a text
        assert all(spelled == b" " + covered for spelled, covered in wrong)
        assert len(wrong) <= 1
    else:
        assert not wrong


def test_a_leading_space_in_the_text_is_covered(tokenizer_folders: dict[str, Path]) -> None:
    for kind, first in (("llama", b""), ("metaspace", b" ")):
        tokenizer = load(tokenizer_folders[kind])
        encoding = tokenizer.encode(" zqzq")
        assert tokenizer.token_bytes[encoding.ids[0]] == b" "
        assert b" zqzq"[: encoding.ends[0]] == first


def test_only_sentencepiece_strips_a_leading_space(tokenizer: ByteTokenizer) -> None:
    is_sentencepiece = "▁" in tokenizer.hf.get_vocab()
    assert tokenizer.strips_leading_space == is_sentencepiece


def test_ids_are_the_tokenizers_own(tokenizer: ByteTokenizer) -> None:
    for name in ("english", "code", "chinese", "emoji", "decomposed"):
        own = tokenizer.hf(TEXTS[name], add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(TEXTS[name]).ids.tolist() == own


def test_a_batch_is_its_texts_one_by_one(tokenizer: ByteTokenizer) -> None:
    texts = list(TEXTS.values())
    for text, encoding in zip(texts, tokenizer.encode_each(texts), strict=True):
        assert isinstance(encoding, Encoding)
        alone = tokenizer.encode(text)
        assert encoding.ids.tolist() == alone.ids.tolist()
        assert encoding.ends.tolist() == alone.ends.tolist()


def test_a_token_may_end_inside_a_character() -> None:
    encoding = ByteTokenizer(byte_level(), "bytes").encode("a€b")
    assert encoding.ends.tolist() == [1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------------- normalisers


def test_lowercased_tokens_cover_the_capitals() -> None:
    tokenizer = ByteTokenizer(byte_level(normalizer=normalizers.Lowercase()), "lower")
    encoding = tokenizer.encode("AbC€")
    assert [tokenizer.token_bytes[i] for i in encoding.ids[:3]] == [b"a", b"b", b"c"]
    assert encoding.ends.tolist() == [1, 2, 3, 4, 5, 6]


def test_of_the_tokens_of_an_expanded_character_the_last_covers_it() -> None:
    tokenizer = ByteTokenizer(byte_level(normalizer=normalizers.NFKC()), "nfkc")
    encoding = tokenizer.encode("aⅧb")  # → aVIIIb
    assert encoding.ends.tolist() == [1, 1, 1, 1, 4, 5]


def test_a_composed_accent_goes_with_its_letter() -> None:
    tokenizer = ByteTokenizer(byte_level(normalizer=normalizers.NFC()), "nfc")
    encoding = tokenizer.encode("ae\u0301b")  # → aéb, é of two byte tokens
    assert encoding.ends.tolist() == [1, 1, 4, 5]


def test_collapsed_white_space_is_covered() -> None:
    collapse = normalizers.Sequence([normalizers.Replace(Regex(" +"), " "), normalizers.Strip()])
    tokenizer = ByteTokenizer(byte_level(normalizer=collapse), "collapsing")
    encoding = tokenizer.encode("  a    b \n")
    assert [tokenizer.token_bytes[i] for i in encoding.ids] == [b"a", b" ", b"b"]
    assert encoding.ends.tolist() == [3, 7, 10]


def test_text_that_a_normaliser_drops_is_refused() -> None:
    tokenizer = ByteTokenizer(byte_level(normalizer=normalizers.Replace("secret", "")), "dropping")
    with pytest.raises(TokenizerError, match=r"dropping: no token covers the text 'secret' at byte 3"):
        tokenizer.encode("a, secret plan")
    with pytest.raises(TokenizerError, match="no token covers the text 'secret' at byte 0"):
        tokenizer.encode("secret")


def test_bytes_without_a_token_go_with_the_next_token_if_they_are_no_text() -> None:
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in ("Ĕ", "Ã")]  # \x14, \xc3
    tokenizer = ByteTokenizer(
        byte_level(model=models.BPE({c: i for i, c in enumerate(alphabet)}, [])), "gaps"
    )
    encoding = tokenizer.encode("a\x14b\x14\x14")
    assert [tokenizer.token_bytes[i] for i in encoding.ids] == [b"a", b"b"]
    assert encoding.ends.tolist() == [1, 5]
    with pytest.raises(TokenizerError, match="gaps: no token covers the text 'é' at byte 2"):
        tokenizer.encode("caé")


def test_an_unknown_token_that_swallows_text_is_refused() -> None:
    fast = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "b": 3}, [], unk_token="<unk>"))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Replace("▁", " ")
    tokenizer = ByteTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast), "tiny")
    assert tokenizer.encode("ab a").ends.tolist() == [1, 2, 3, 4]
    with pytest.raises(TokenizerError, match=r"tiny: token '<unk>' \(id 0\) swallows the text '€' at byte 3"):
        tokenizer.encode("ab €")


def test_a_text_that_cannot_be_encoded_leaves_the_others_as_they_are() -> None:
    fast = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>"))
    letters = ByteTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast), "letters")
    ab, refused, nothing, b = letters.encode_each(["ab", "a€", "", "b"])
    assert isinstance(refused, TokenizerError)
    assert "'€'" in str(refused)
    for text, outcome in (("ab", ab), ("", nothing), ("b", b)):
        assert isinstance(outcome, Encoding)
        alone = letters.encode(text)
        assert (outcome.ids.tolist(), outcome.ends.tolist()) == (alone.ids.tolist(), alone.ends.tolist())
    with pytest.raises(TokenizerError, match="swallows the text '€'"):
        letters.encode("a€")


def test_an_unpaired_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match="character 1 of the text is an unpaired surrogate"):
        ByteTokenizer(byte_level(), "bytes").encode("a\ud83d")


# ----------------------------------------------------------------------------- control and added tokens


def test_control_tokens_written_in_a_text_are_spelled_out(tokenizer: ByteTokenizer) -> None:
    control = [token for token in tokenizer.hf.all_special_tokens if isinstance(token, str)]
    text = "a".join([*control, *map(str, tokenizer.hf.added_tokens_decoder.values()), ""])
    encoding = tokenizer.encode(text)
    check_tiling(encoding, text)
    assert not tokenizer.special_ids & set(encoding.ids.tolist())


def test_bos_is_added_where_it_is_asked_for(tokenizer_folders: dict[str, Path]) -> None:
    folder = str(tokenizer_folders["llama"])
    own = ByteTokenizer.of_model(ModelConfig(model=folder))
    without = ByteTokenizer.of_model(TeacherConfig(name="t", model=folder, add_bos=False))
    again = ByteTokenizer.of_model(TeacherConfig(name="t", model=folder, add_bos=True))
    assert own.sequence("a b", False).ids.tolist() == [own.bos_id, *without.sequence("a b", False).ids]
    assert (without.bos_id, again.bos_id) == (None, own.bos_id)
    assert own.fingerprint == again.fingerprint != without.fingerprint
    hf = byte_level()
    assert hf.bos_token is None
    with pytest.raises(TokenizerError, match="bytes: add_bos is set, and the tokenizer has no BOS"):
        ByteTokenizer(hf, "bytes", add_bos=True)


def test_added_tokens_that_are_not_special_are_text(tokenizer_folders: dict[str, Path]) -> None:
    for kind in ("bytelevel", "llama", "unigram"):
        hf = transformers.AutoTokenizer.from_pretrained(tokenizer_folders[kind])
        hf.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "\n\n", "héé ")])
        hf.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
        hf.add_tokens([AddedToken("<last>", normalized=False)])
        tokenizer = ByteTokenizer(hf, kind)
        text = "a<think>b\n\n<|tool|> c héé <last>"
        encoding = tokenizer.encode(text)
        spelled = [tokenizer.token_bytes[i] for i in encoding.ids]
        assert {b"<think>", b"\n\n", "héé ".encode(), b"<last>"} <= set(spelled)
        assert hf.convert_tokens_to_ids("<last>") in encoding.ids
        assert hf.convert_tokens_to_ids("<|tool|>") not in encoding.ids
        starts = [0, *encoding.ends[:-1].tolist()]
        assert text.encode().index(b"<think>") in starts
        assert encoding.ends[-1] == len(text.encode())


def test_a_padding_token_that_is_ordinary_text_stays_text() -> None:
    hf = byte_level()
    hf.pad_token = "!"
    tokenizer = ByteTokenizer(hf, "bytes")
    assert tokenizer.encode("a!").ends.tolist() == [1, 2]
    assert tokenizer.token_bytes[hf.pad_token_id] == b"!"


# ------------------------------------------------------------------------------------------ vocabulary


def test_byte_tokens_of_both_families_are_the_same_bytes(tokenizer_folders: dict[str, Path]) -> None:
    for kind, newline in (("bytelevel", "Ċ"), ("llama", "<0x0A>"), ("unigram", "<0x0A>")):
        tokenizer = load(tokenizer_folders[kind])
        assert tokenizer.token_bytes[tokenizer.hf.convert_tokens_to_ids(newline)] == b"\n"


def test_a_sentencepiece_vocabulary_with_a_byte_level_letter_is_sentencepiece() -> None:
    fast = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "Ġ": 2, "a": 3}, [], unk_token="<unk>"))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = ByteTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast), "gemma-like")
    assert list(tokenizer.token_bytes) == [None, b" ", "Ġ".encode(), b"a"]
    assert tokenizer.encode("a Ġ").ends.tolist() == [1, 2, 4]
    assert not tokenizer.strips_leading_space


def test_a_plain_vocabulary_is_its_own_text() -> None:
    fast = Tokenizer(models.BPE({"a": 0, "é": 1, " ": 2, "▁": 3}, []))
    tokenizer = ByteTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast), "plain")
    assert list(tokenizer.token_bytes) == [b"a", "é".encode(), b" ", "▁".encode()]
    assert tokenizer.encode("a é▁").ends.tolist() == [1, 2, 4, 7]


def test_ids_beyond_the_tokenizer_have_no_bytes(tokenizer_folders: dict[str, Path]) -> None:
    size = load(tokenizer_folders["llama"]).vocab_size
    padded = ByteTokenizer.load(str(tokenizer_folders["llama"]), vocab_size=size + 64)
    assert padded.vocab_size == len(padded.token_bytes) == size + 64
    assert set(padded.token_bytes[size:]) == {None}


def test_a_token_without_an_embedding_is_refused(tokenizer_folders: dict[str, Path]) -> None:
    with pytest.raises(TokenizerError, match=r"token id 1199, the model only 1000 embeddings"):
        ByteTokenizer.load(str(tokenizer_folders["llama"]), vocab_size=1000)


def test_a_padding_token_needs_no_embedding(tokenizer_folders: dict[str, Path]) -> None:
    hf = transformers.AutoTokenizer.from_pretrained(tokenizer_folders["llama"])
    size = len(hf)
    hf.add_special_tokens({"pad_token": "<pad>"})
    tokenizer = ByteTokenizer(hf, "llama", vocab_size=size)
    assert tokenizer.vocab_size == size
    assert hf.pad_token_id == size
    check_tiling(tokenizer.encode("a<pad>b"), "a<pad>b")


def test_bos_is_known_only_where_the_tokenizer_prepends_it(tokenizer_folders: dict[str, Path]) -> None:
    assert load(tokenizer_folders["llama"]).bos_id == 1
    for kind in ("bytelevel", "metaspace", "unigram", "normalising"):
        assert load(tokenizer_folders[kind]).hf.bos_token_id is not None
        assert load(tokenizer_folders[kind]).bos_id is None


def test_a_sequence_has_bos_at_zero_and_eos_without_width(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load(tokenizer_folders["llama"])
    plain, text = tokenizer.encode("a é"), "a é"
    whole, piece = tokenizer.sequence(text, ends_document=True), tokenizer.sequence(text, ends_document=False)
    assert whole.ids.tolist() == [1, *plain.ids, 2]
    assert whole.ends.tolist() == [0, *plain.ends, 4]
    assert piece.ids.tolist() == [1, *plain.ids]
    assert tokenizer.sequence("", ends_document=True).ids.tolist() == [1, 2]


def test_without_bos_and_eos_a_sequence_is_the_encoding() -> None:
    fast = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer = ByteTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast), "plain")
    assert tokenizer.bos_id is None
    assert tokenizer.eos_id is None
    assert tokenizer.sequence("aa", ends_document=True).ids.tolist() == [0, 0]


def test_the_fingerprint_tells_tokenizers_apart(tokenizer_folders: dict[str, Path]) -> None:
    prints = [load(folder).fingerprint for folder in tokenizer_folders.values()]
    prints.append(ByteTokenizer.load(str(tokenizer_folders["llama"]), vocab_size=1264).fingerprint)
    assert len(set(prints)) == len(prints)
    assert ByteTokenizer.load(str(tokenizer_folders["llama"])).fingerprint in prints


# ---------------------------------------------------------------------------------------------- errors


def wordpiece() -> transformers.PreTrainedTokenizerBase:
    fast = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast)


def two_prefixes() -> transformers.PreTrainedTokenizerBase:
    template = processors.TemplateProcessing(single="<x> <y> $A", special_tokens=[("<x>", 0), ("<y>", 1)])
    return byte_level(post_processor=template)


class Slow(transformers.PythonBackend):
    """Splits into characters, in Python."""

    vocab_size = 1

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wordpiece, "WordPiece vocabulary with word affixes"),
        (two_prefixes, "prepends 2 special tokens"),
        (Slow, "Slow is not a fast tokenizer"),
    ],
)
def test_tokenizers_that_cannot_say_what_they_cover_are_refused(
    make: Callable[[], transformers.PreTrainedTokenizerBase], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        ByteTokenizer(make(), "it")


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such folder"):
        ByteTokenizer.load(str(tmp_path / "absent"))
    with pytest.raises(TokenizerError, match="no tokenizer could be loaded") as caught:
        ByteTokenizer.load(str(tmp_path))
    assert caught.value.__cause__ is not None


def test_a_broken_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(TokenizerError, match="no tokenizer could be loaded"):
        ByteTokenizer.load(str(tmp_path))
