"""`fusellm-ray evaluate` and `fusellm-ray align` on small real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from fusellm_ray.alignment.project import Aligner
from fusellm_ray.config import AlignmentConfig, TeacherConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ConfigError, CorpusError, ModelError, TokenizerError
from fusellm_ray.evaluate import models as evaluate_module
from fusellm_ray.evaluate.alignment import _pieces, picture, sequences_of, show_alignment
from fusellm_ray.evaluate.ensemble import evaluate_ensemble
from fusellm_ray.evaluate.models import evaluate_models
from fusellm_ray.evaluate.table import Grid
from fusellm_ray.perplexity import DocumentScore
from tests.runs import model_folder

TEXT = "def area(width, height):\n\treturn width * height  # café, 今天 😀\n\nThe strength of the naïve method.\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "a": model_folder("llama_tied", tokenizer_folders["llama"], folder / "a", seed=1),
        "b": model_folder("gpt_neox", tokenizer_folders["unigram"], folder / "b", seed=2),
    }


def test_the_report_has_every_model_and_corpus_their_mean_and_paired_differences(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "x.txt").write_text(TEXT * 5)
    lines = [json.dumps({"body": TEXT[: 20 + 5 * i]}) for i in range(12)]
    (tmp_path / "y.jsonl").write_text("\n".join(lines))
    names = [str(path) for path in models.values()]
    report = evaluate_models(
        names,
        [f"x={tmp_path / 'x.txt'}", f"y={tmp_path / 'y.jsonl'}"],
        field="body",
        context=64,
        ensembles=[",".join(names)],
        num_resamples=100,
        json_path=tmp_path / "out.json",
        markdown_path=tmp_path / "out.md",
    )
    assert json.loads((tmp_path / "out.json").read_text()) == report
    team = f"ensemble {','.join(names)}"
    assert list(report["models"]) == [*names, team]
    assert report["differences"].keys() == {names[1], team}
    bits = {
        model: {domain: score["bits_per_byte"] for domain, score in own["domains"].items()}
        for model, own in report["models"].items()
    }
    for model, by_domain in bits.items():
        assert by_domain.keys() == {"x", "y"}
        assert report["models"][model]["mean"] == pytest.approx(sum(by_domain.values()) / 2)
        assert 0 < by_domain["x"] < 20
    assert report["against"] == names[0]
    difference = report["differences"][names[1]]
    assert difference["y"]["difference"] == pytest.approx(bits[names[1]]["y"] - bits[names[0]]["y"])
    assert difference["y"]["low"] <= difference["y"]["difference"] <= difference["y"]["high"]
    assert difference["x"]["low"] is None  # one document
    shown = f"{difference['y']['difference']:+.4f} ({difference['y']['low']:+.4f}"
    assert shown in (tmp_path / "out.md").read_text()
    assert f"{report['models'][names[1]]['mean']:.4f}" in capsys.readouterr().out


def test_corpora_must_be_named_and_named_once(models: dict[str, Path], tmp_path: Path):
    (tmp_path / "x.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match="expected NAME=PATH"):
        evaluate_models([str(models["a"])], [str(tmp_path / "x.txt")])
    with pytest.raises(ConfigError, match="two corpora are named 'x'"):
        evaluate_models([str(models["a"])], [f"x={tmp_path / 'x.txt'}"] * 2)
    with pytest.raises(ConfigError, match=r"--corpus 'my text=.*\n  name: String should match"):
        evaluate_models([str(models["a"])], [f"my text={tmp_path / 'x.txt'}"])


def test_a_saved_dataset_is_a_corpus_with_its_splits(
    models: dict[str, Path], tmp_path: Path, arrow_cache: Path
):
    texts = [TEXT, TEXT[:40]]
    splits = {"train": ["other"], "test": texts}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict({"body": v}) for k, v in splits.items()})
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    name = str(models["a"])
    places = [f"dataset:{tmp_path / 'saved'},split=test", str(tmp_path / "x.jsonl")]
    bits = [
        evaluate_models([name], [f"x={place}"], field="body", num_resamples=10)["models"][name]["mean"]
        for place in places
    ]
    assert bits[0] == bits[1]
    with pytest.raises(CorpusError, match="has no split 'validation'; it has train, test"):
        evaluate_models([name], [f"x=dataset:{tmp_path / 'saved'},split=validation"], field="body")
    with pytest.raises(ConfigError, match="spilt: unknown key; did you mean 'split'"):
        evaluate_models([name], [f"x=dataset:{tmp_path / 'saved'},spilt=test"], field="body")
    with pytest.raises(ConfigError, match="'weight=2' is no setting of a dataset"):
        evaluate_models([name], [f"x=dataset:{tmp_path / 'saved'},weight=2"], field="body")
    with pytest.raises(CorpusError, match=r"written by Dataset\.save_to_disk; give it as a dataset"):
        evaluate_models([name], [f"x={tmp_path / 'saved'}"], field="body")


def test_what_cannot_be_evaluated_is_refused_before_the_first_model_is_scored(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "x.txt").write_text(TEXT)
    monkeypatch.setattr(evaluate_module, "evaluate_model", lambda *_, **__: pytest.fail("scored"))
    name, corpus = str(models["a"]), [f"x={tmp_path / 'x.txt'}"]
    absent = str(tmp_path / "absent")
    with pytest.raises((ModelError, TokenizerError), match="absent"):
        evaluate_models([name, absent], corpus)
    with pytest.raises((ModelError, TokenizerError), match="absent"):
        evaluate_models([name], corpus, ensembles=[f"{name},{absent}"])
    with pytest.raises(ConfigError, match="tasks are not run on ensembles"):
        evaluate_models([name], [], tasks=["boolq"], ensembles=[f"{name},{name}"])
    with pytest.raises(ConfigError, match=r"--add-bos 'other' is none of the models"):
        evaluate_models([name], corpus, add_bos=["other"])


def test_a_model_told_to_begins_texts_with_bos_alone_and_in_an_ensemble(
    tokenizer_folders: dict[str, Path], tmp_path: Path
):
    (tmp_path / "x.txt").write_text(TEXT)
    # Its tokenizer has a BOS, and adds none.
    name = str(model_folder("llama_tied", tokenizer_folders["bytelevel"], tmp_path / "model", seed=1))
    corpus = [f"x={tmp_path / 'x.txt'}"]
    plain = evaluate_models([name], corpus, num_resamples=10)["models"][name]["domains"]["x"]
    told = evaluate_models([name], corpus, add_bos=[name], ensembles=[f"{name},{name}"], num_resamples=10)[
        "models"
    ]
    alone, team = (told[key]["domains"]["x"] for key in told)
    # With BOS the first token is predicted, too.
    assert (alone["bytes"], alone["tokens"]) == (len(TEXT.encode()), plain["tokens"] + 1)
    assert plain["bytes"] < alone["bytes"]
    assert team["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-5)


def test_threads_and_dtype_hold_for_ensembles_too(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "x.txt").write_text(TEXT)
    asked: list[TeacherConfig] = []

    def ensemble(teachers: list[TeacherConfig], *args: Any, **options: Any) -> list[DocumentScore]:
        asked.extend(teachers)
        return evaluate_ensemble(teachers, *args, **options)

    monkeypatch.setattr(evaluate_module, "evaluate_ensemble", ensemble)
    name, threads = str(models["a"]), torch.get_num_threads()
    try:
        evaluate_models(
            [name],
            [f"x={tmp_path / 'x.txt'}"],
            threads=threads + 1,
            dtype="bfloat16",
            ensembles=[f"{name},{name}"],
            num_resamples=10,
        )
    finally:
        torch.set_num_threads(threads)
    assert [t.engine.model_dump(include={"dtype", "threads"}) for t in asked] == [
        {"dtype": "bfloat16", "threads": threads + 1}
    ] * 2


def test_a_grid_prints_brackets_as_they_are(capsys: pytest.CaptureFixture[str]):
    Grid("[/title]", ["model", "[x]"], [["models/[a]", "[/b]"]], frozenset({(0, 1)})).print()
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[/title]", "[x]", "models/[a]", "[/b]"))


def test_align_measures_with_the_model_and_writes_what_it_prints(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "text.txt").write_text(TEXT)
    figures = show_alignment(
        str(models["a"]),
        str(models["b"]),
        tmp_path / "text.txt",
        config=AlignmentConfig(),
        with_model=True,
        json_path=tmp_path / "out.json",
    )
    assert json.loads((tmp_path / "out.json").read_text()) == figures
    assert figures["fidelity"] == pytest.approx(1, abs=0.01)
    assert figures["coverage"] > 0.95
    assert sum(figures["shares"].values()) == pytest.approx(1)
    assert sum(figures["vocabulary_mass"].values()) == pytest.approx(1)
    assert f"{figures['coverage']:.4f}" in capsys.readouterr().out


def test_the_picture_shows_the_same_characters_twice_and_bars_where_tokens_end(models: dict[str, Path]):
    target, teacher = (ByteTokenizer.load(str(path)) for path in models.values())
    aligner = Aligner(teacher, target, AlignmentConfig(), top_k=4)
    upper, lower = picture(
        aligner, sequences_of(aligner, "The strength", is_last=True), 100, 200
    ).plain.split("\n")
    assert len(upper) == len(lower)
    columns = [pair for pair in zip(upper, lower, strict=True) if "│" not in pair]
    assert "".join(a for a, _ in columns) == "".join(b for _, b in columns) == "The strength"
    for line, tokenizer in ((upper, target), (lower, teacher)):
        assert line.count("│") == len(set(tokenizer.encode("The strength").ends.tolist()))


def test_a_limit_leaves_out_a_cut_character_and_no_byte_before_it(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes("aé".encode() + b"\xff" + b"b" * 10)
    assert _pieces(path, 2) == ["a"]
    assert _pieces(path, 3) == ["aé"]
    with pytest.raises(CorpusError, match="byte 3 is not UTF-8"):
        _pieces(path, 5)


@pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b"ab\xff", "byte 2 is not UTF-8")])
def test_align_refuses_what_is_no_text(models: dict[str, Path], tmp_path: Path, content: bytes, says: str):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=says):
        show_alignment(
            str(models["a"]),
            str(models["b"]),
            tmp_path / "bad.txt",
            config=AlignmentConfig(),
            with_model=False,
        )
