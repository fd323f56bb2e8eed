"""Long segments in windows: no prediction is lost, and none is made without context. Text that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fusellm_ray.corpus.rows import Segment
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import TokenizerError
from fusellm_ray.teachers.engine import Scores
from fusellm_ray.teachers.scoring import TeacherScorer, join_windows, windows

BOS = 1_000_000


@given(st.integers(0, 200), st.integers(2, 60), st.booleans())
def test_windows_together_predict_each_token_once(length: int, max_context: int, has_bos: bool) -> None:
    ids = np.arange(length, dtype=np.int32)
    if has_bos and length:
        ids[0] = BOS
    pieces = windows(ids, max_context, BOS if has_bos else None)
    assert all(2 <= len(prompt) <= max_context for prompt, _ in pieces)
    assert all(prompt[0] == BOS for prompt, _ in pieces) or not has_bos
    predicted = [token for prompt, kept in pieces for token in prompt[len(prompt) - kept :]]
    assert predicted == ids[1:].tolist()
    for prompt, kept in pieces[1:]:
        repeated = len(prompt) - kept - has_bos
        assert repeated >= min(max_context // 4, max_context - has_bos - 1)


def test_a_sequence_that_fits_is_asked_as_it_is() -> None:
    ids = np.arange(8, dtype=np.int32)
    ((prompt, kept),) = windows(ids, 8, None)
    np.testing.assert_array_equal(prompt, ids)
    assert kept == 7


@given(st.integers(0, 90), st.integers(2, 30))
def test_rows_of_windows_join_to_the_rows_of_the_sequence(length: int, max_context: int) -> None:
    """Rows are named by the token they predict, so the join can be seen."""
    ids = np.arange(length, dtype=np.int32)
    answers = []
    for prompt, kept in windows(ids, max_context, None):
        named = prompt[1:].astype(np.float32)
        answers.append((Scores(prompt[1:, None], -named[:, None], -named), kept))
    joined = join_windows(answers, 1)
    np.testing.assert_array_equal(joined.top_ids[:, 0], ids[1:])
    np.testing.assert_array_equal(joined.top_logprobs[:, 0], -ids[1:].astype(np.float32))
    np.testing.assert_array_equal(joined.gold_logprobs, -ids[1:].astype(np.float32))


def test_a_teacher_that_cannot_read_a_text_names_its_document() -> None:
    letters = models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>")
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(letters))
    none = np.zeros(0, np.int32)
    segments = [
        Segment(text=text.encode(), ids=none, ends=none, ends_document=True, domain="prose", document=name)
        for text, name in (("ab", "first"), ("a€", "second"))
    ]
    scorer = object.__new__(TeacherScorer)  # without an engine, which comes after
    scorer._name, scorer.tokenizer = "left", ByteTokenizer(fast, "letters")
    with pytest.raises(TokenizerError, match=r"teacher left: in a part of document second: letters: .*'€'"):
        scorer._tokenise(segments)
