"""lm-evaluation-harness on a local task of three questions, held against a plain computation."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusellm_ray.errors import ConfigError, CorpusError
from fusellm_ray.evaluate.harness import Harness, main_metric, task_grid
from tests.runs import model_folder

QUESTIONS = [
    {"question": "The keyword that defines a function is", "choices": ["def", "while"], "answer": 0},
    {"question": "A list is", "choices": ["a number", "a sequence of objects"], "answer": 1},
    {"question": "To raise an exception, use", "choices": ["raise", "lambda", "import"], "answer": 2},
]
OWN_TASK = {
    "task": "three_questions",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> str:
    folder = tmp_path_factory.mktemp("models") / "a"
    return str(model_folder("llama_tied", tokenizer_folders["bytelevel"], folder, seed=1))


def accuracy(folder: str) -> float:
    """Share of questions whose answer has the highest log-probability of all choices."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for item in QUESTIONS:
        nats = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            context = tokenizer(item["question"]).input_ids
            ids = torch.tensor(context + tokenizer(f" {choice}").input_ids)
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
            nats.append(logprobs.gather(-1, ids[1:, None])[len(context) - 1 :].sum().item())
        right += max(range(len(nats)), key=nats.__getitem__) == item["answer"]
    return right / len(QUESTIONS)


def test_a_task_of_ones_own_and_a_known_one_run_on_local_data(model: str, tmp_path: Path):
    (tmp_path / "three_questions").mkdir()
    lines = "".join(json.dumps(item) + "\n" for item in QUESTIONS)
    (tmp_path / "three_questions" / "test.jsonl").write_text(lines)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN_TASK))
    (tmp_path / "arc_easy").mkdir()
    for split in ("train", "validation", "test"):
        records = [
            {
                "question": item["question"],
                "choices": {"text": item["choices"], "label": list("ABC")[: len(item["choices"])]},  # type: ignore[arg-type]
                "answerKey": "ABC"[item["answer"]],  # type: ignore[index]
            }
            for item in QUESTIONS
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "arc_easy" / f"{split}.jsonl").write_text(text)
    scores = Harness(["three_questions", "arc_easy"], data=tmp_path).evaluate(model)
    assert list(scores) == ["three_questions", "arc_easy"]
    assert scores["three_questions"]["acc"] == pytest.approx(accuracy(model))
    assert 0 <= scores["arc_easy"]["acc_norm"] <= 1
    assert main_metric(scores["arc_easy"]) == "acc_norm"
    text = task_grid({"model": scores}).markdown()
    assert f"**{scores['three_questions']['acc']:.4f} ±" in text


def test_an_unknown_task_is_refused_and_absent_data_told_where_to_be_put(tmp_path: Path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN_TASK | {"dataset_path": str(tmp_path / "absent")}))
    with pytest.raises(ConfigError, match="knows no no_such_task"):
        Harness(["three_questions", "no_such_task"], data=tmp_path)
    with pytest.raises(CorpusError, match=r"DATA/three_questions/SPLIT.jsonl"):
        Harness(["three_questions"], data=tmp_path)


def test_without_the_harness_the_error_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def absent(name: str, *args: object) -> object:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"fusellm-ray\[harness\]"):
        Harness(["boolq"])
