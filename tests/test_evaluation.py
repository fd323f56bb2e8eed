"""Evaluation during training: when it has stopped improving, and what the target says by then."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusellm_ray.config import EarlyStop, EvaluationConfig, TargetConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.target.evaluation import Best, sample
from fusellm_ray.target.model import build_target
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.tokenizers import build

STOP = EarlyStop(patience=2, min_delta=0.1)


def judge(figures, early_stop):
    best, seen = Best(), []
    for figure in figures:
        seen.append((best.add(figure, early_stop), best.is_exhausted(early_stop)))
    return seen


def test_training_is_exhausted_after_patience_evaluations_without_an_improvement():
    assert [exhausted for _, exhausted in judge([3, 2, 2.05, 1.95, 1.9], STOP)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert not any(exhausted for _, exhausted in judge([3, 2.95, 2.85, 2.80, 2.70], STOP))
    assert not any(exhausted for _, exhausted in judge([3, 4, 5, 6], None))


def test_the_best_is_the_least_figure_whatever_counts_as_an_improvement():
    assert [is_best for is_best, _ in judge([3, 2.95, math.nan, 2.95, 2.9], STOP)] == [
        True,
        True,
        False,
        False,
        True,
    ]


PROMPTS = ["def f(x):", "The"]


def samples(mesh, folder, temperature):
    model = build_target(TargetConfig(model=folder), mesh)
    before = torch.get_rng_state()
    config = EvaluationConfig(prompts=PROMPTS, sample_tokens=12, sample_temperature=temperature)
    texts = sample(
        model, ByteTokenizer.load(folder, vocab_size=1200), config, seed=7, device=torch.device("cpu")
    )
    assert torch.equal(torch.get_rng_state(), before)
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("bytelevel", folder)
    return str(tiny_model("llama", 1200, folder))


def test_greedy_samples_are_those_of_generate_on_one_rank_and_two(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = ByteTokenizer.load(folder, vocab_size=1200)
    wanted = []
    for prompt in PROMPTS:
        ids = tokenizer.sequence(prompt, False).ids
        answer = model.generate(
            torch.from_numpy(ids).long()[None],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
        )[0, len(ids) :].tolist()
        wanted.append(b"".join(tokenizer.token_bytes[i] or b"" for i in answer).decode(errors="replace"))
    for num_ranks in (1, 2):
        for texts in run_ranks(num_ranks, samples, folder, 0.0):
            assert texts == wanted


def test_drawn_samples_depend_on_the_seed_alone(folder):
    (one,) = run_ranks(1, samples, folder, 1.0)
    assert run_ranks(2, samples, folder, 1.0) == [one, one]
