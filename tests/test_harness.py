"""lm-evaluation-harness on a local task of three questions, held against a plain computation."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusellm_ray.config import ReaderConfig
from fusellm_ray.errors import ConfigError, CorpusError, ModelError
from fusellm_ray.evaluate.harness import Harness, _tokenizer, main_metric, task_grid
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


def write_task(folder: Path, task: dict[str, object], questions: list[dict[str, object]] = QUESTIONS) -> None:
    """A task and its records, as `--data` has them."""
    name = str(task["task"])
    (folder / name).mkdir()
    (folder / name / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in questions))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def generates(name: str, **changes: object) -> dict[str, object]:
    """A task that reads an answer of a few tokens through two filters."""
    return {
        "task": name,
        "dataset_path": "json",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "filter_list": [
            {
                "name": "always-def",
                "filter": [
                    {"function": "regex", "regex_pattern": "(never)", "fallback": "def"},
                    {"function": "take_first"},
                ],
            },
            {"name": "as-it-is", "filter": [{"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    } | changes


def test_a_task_with_filters_is_judged_by_its_first_filters_metric_and_error(model: str, tmp_path: Path):
    write_task(tmp_path, generates("written"))
    harness = Harness(["written"], data=tmp_path)
    scores = harness.evaluate(ReaderConfig(model=model))
    # One of the three answers is "def", which the first filter makes of everything.
    assert scores["written"]["exact_match,always-def"] == pytest.approx(1 / 3)
    assert scores["written"]["exact_match,as-it-is"] == 0
    assert "sample_len" not in scores["written"]
    error = scores["written"]["exact_match_stderr,always-def"]
    text = task_grid({"model": scores}, harness.columns).markdown()
    assert "written (exact_match,always-def)" in text
    assert f"**0.3333 ± {error:.4f}**" in text


def test_the_best_of_a_perplexity_is_the_lowest():
    scores = {"a": {"wiki": {"word_perplexity": 20.0}}, "b": {"wiki": {"word_perplexity": 30.0}}}
    text = task_grid(scores, ["wiki"]).markdown()
    assert "wiki (word_perplexity; lower is better)" in text
    assert "| a | **20.0000** |" in text
    assert "| b | 30.0000 |" in text


def test_a_groups_mean_and_its_tasks_local_data_are_kept(model: str, tmp_path: Path):
    group = {
        "group": "both",
        "task": ["one", "two"],
        "aggregate_metric_list": [
            {"metric": "exact_match", "weight_by_size": True, "filter_list": "always-def"}
        ],
    }
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    elsewhere = str(tmp_path / "absent")
    write_task(tmp_path, generates("one", dataset_path=elsewhere))
    write_task(tmp_path, generates("two", dataset_path=elsewhere), QUESTIONS[:1])
    harness = Harness(["both"], data=tmp_path)
    scores = harness.evaluate(ReaderConfig(model=model))
    shares = {name: scores[name]["exact_match,always-def"] for name in ("one", "two", "both")}
    assert shares == pytest.approx({"one": 1 / 3, "two": 1.0, "both": 2 / 4})
    assert task_grid({"model": scores}, harness.columns).columns == ["model", "both (exact_match,always-def)"]
    with pytest.raises(ConfigError, match=r"Duplicate task 'one'.*name it once"):
        Harness(["both", "one"], data=tmp_path)
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "test.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="both is a group; its tasks are one, two"):
        Harness(["both"], data=tmp_path)


def test_code_that_models_write_runs_only_where_that_is_allowed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ConfigError, match=r"humaneval run the Python .* --allow-code-execution"):
        Harness(["humaneval"])
    write_task(tmp_path, generates("code", unsafe_code=True))
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "coding", "task": ["code"]}))
    with pytest.raises(ConfigError, match="--tasks: code run the Python"):
        Harness(["coding"], data=tmp_path)
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")  # so that it is taken back
    harness = Harness(["coding"], data=tmp_path, allow_code_execution=True)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    assert harness.columns == ["code"]  # a group without a mean
    assert harness.evaluate(ReaderConfig(model=model))["code"]["exact_match,as-it-is"] == 0


def test_what_fails_in_a_task_names_the_model_and_the_task(model: str, tmp_path: Path):
    write_task(tmp_path, generates("broken", doc_to_target="{{ no_such(1) if answer == 2 else 1 }}"))
    harness = Harness(["broken"], data=tmp_path)
    with pytest.raises(ModelError, match=r"on tasks broken: lm-evaluation-harness failed with"):
        harness.evaluate(ReaderConfig(model=model))


def test_a_bos_that_a_tokenizer_lost_is_read_by_tasks_too(model: str):
    plain, begun = (_tokenizer(ReaderConfig(model=model, add_bos=told)) for told in (None, True))
    ids = plain("some text").input_ids
    assert plain.bos_token_id not in ids
    assert begun("some text").input_ids == [plain.bos_token_id, *ids]


def test_a_task_of_ones_own_and_a_known_one_run_on_local_data(model: str, tmp_path: Path):
    write_task(tmp_path, OWN_TASK)
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
    harness = Harness(["three_questions", "arc_easy"], data=tmp_path)
    scores = harness.evaluate(ReaderConfig(model=model))
    assert list(scores) == ["three_questions", "arc_easy"]
    assert scores["three_questions"]["acc"] == pytest.approx(accuracy(model))
    assert 0 <= scores["arc_easy"]["acc_norm"] <= 1
    assert main_metric(scores["arc_easy"]) == "acc_norm"
    text = task_grid({"model": scores}, harness.columns).markdown()
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
