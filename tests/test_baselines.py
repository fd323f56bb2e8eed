"""The baselines that need no training: the ensemble against dense softmaxes, merges against their papers' formulas."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mergekit.config import MergeConfiguration
from transformers import AutoModelForCausalLM

from fusellm_ray.config import ModelConfig, TeacherConfig
from fusellm_ray.corpus.source import Document
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ConfigError
from fusellm_ray.evaluate.ensemble import evaluate_ensemble
from fusellm_ray.evaluate.merge import _recipe, merge_models
from fusellm_ray.perplexity import evaluate_model
from tests.runs import model_folder

TEXTS = ["The naïve café — 今天天气很好.\n" * 6, "def area(w, h):\n\treturn w * h  # 😀\n", "x"]
DOCUMENTS = [Document(text, "a", f"a:{i}") for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, str]:
    """`base`, `one`, `two`, `three` share architecture and tokenizer; `other` shares neither."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        name: model_folder("llama_tied", tokenizer_folders["llama"], folder / name, seed=seed)
        for seed, name in enumerate(("base", "one", "two", "three"))
    }
    made["other"] = model_folder("gpt_neox", tokenizer_folders["unigram"], folder / "other", seed=9)
    return {name: str(path) for name, path in made.items()}


def config(model: str | Path) -> ModelConfig:
    return ModelConfig(model=str(model))


def teacher(model: str, **settings: object) -> TeacherConfig:
    return TeacherConfig.model_validate({"name": Path(model).name, "model": model, "top_k": 8, **settings})


@pytest.mark.parametrize("row_tokens", [128, 24])
@pytest.mark.parametrize("name", ["one", "other"])
def test_an_ensemble_of_one_pays_what_its_teacher_pays_alone(
    models: dict[str, str], name: str, row_tokens: int
):
    """Through another tokenizer too: gold nats telescope, up to what is outside the top k at straddled tokens."""
    target = ByteTokenizer.load(models["base"])
    member = teacher(models[name], top_k=400 if name == "other" else 8)
    together = evaluate_ensemble([member], target, DOCUMENTS, row_tokens=row_tokens)
    alone = evaluate_model(ModelConfig(model=models[name]), DOCUMENTS, row_tokens=row_tokens)
    for ensemble, single in zip(together, alone, strict=True):
        if name == "one":
            assert ensemble.nats == pytest.approx(single.nats, rel=1e-5)
            assert (ensemble.bytes, ensemble.tokens) == (single.bytes, single.tokens)
        elif single.bytes == ensemble.bytes:
            assert ensemble.nats == pytest.approx(single.nats, rel=0.02, abs=0.05)


def test_an_ensemble_leaves_torch_the_threads_it_had(models: dict[str, str]):
    threads = torch.get_num_threads()
    member = teacher(models["one"], engine={"type": "transformers", "threads": threads + 1})
    evaluate_ensemble([member], ByteTokenizer.load(models["base"]), DOCUMENTS[1:2])
    assert torch.get_num_threads() == threads


def test_an_ensemble_pays_for_the_mean_of_its_teachers_probabilities(models: dict[str, str]):
    tokenizer = ByteTokenizer.load(models["base"])
    names = ["one", "two", "three"]
    scores = evaluate_ensemble([teacher(models[name]) for name in names], tokenizer, DOCUMENTS)
    ids = torch.from_numpy(tokenizer.sequence(TEXTS[0], ends_document=False).ids).long()
    gold = []
    for name in names:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(models[name])(ids[None]).logits[0, :-1]
        gold.append(logits.double().softmax(-1).gather(-1, ids[1:, None])[:, 0])
    assert scores[0].nats == pytest.approx(-torch.stack(gold).mean(0).log().sum().item(), rel=1e-5)
    assert [s.name for s in scores] == [d.name for d in DOCUMENTS]


# ------------------------------------------------------------------------------------ merging


def weights(model: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()


def reference(method: str, base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    if method == "linear":
        return torch.stack(models).mean(0)
    if method == "slerp" and len(models) > 2:
        # At equal weights multislerp ends where it begins: on the sphere above the mean of the directions.
        flat = torch.stack([m.double().flatten() for m in models])
        norms = flat.norm(dim=1)
        direction = (flat / norms[:, None]).mean(0)
        return (direction / direction.norm() * norms.mean()).reshape(base.shape)
    if method == "slerp":
        a, b = (m.double().flatten() for m in models)
        angle = torch.arccos(torch.dot(a / a.norm(), b / b.norm()))
        return (torch.sin(angle / 2) / torch.sin(angle) * (a + b)).reshape(base.shape)
    deltas = torch.stack(models) - base
    if method == "ties":
        kept = torch.zeros_like(deltas)
        for delta, out in zip(deltas, kept, strict=True):
            top = delta.abs().flatten().topk(delta.numel() // 2).indices
            out.flatten()[top] = delta.flatten()[top]
        agrees = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
        return base + (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    energy = deltas.square().flatten(1).mean(1)
    energy = (energy / energy.sum()).reshape(-1, *[1] * base.dim())
    agrees = deltas.sign() == deltas.sum(0).sign()
    return base + (deltas * energy * agrees).sum(0) / (energy * agrees).sum(0).clamp(min=1e-6)


@pytest.mark.parametrize(
    ("method", "count"), [("linear", 3), ("slerp", 2), ("slerp", 3), ("ties", 3), ("sce", 3)]
)
def test_a_merge_is_what_its_paper_says(models: dict[str, str], tmp_path: Path, method: str, count: int):
    names = ["one", "two", "three"][:count]
    out = merge_models(
        method, [config(models[n]) for n in names], tmp_path / "out", base=config(models["base"])
    )  # type: ignore[arg-type]
    base, got, sources = weights(models["base"]), weights(out), [weights(models[n]) for n in names]
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        expected = reference(method, base[name], [s[name] for s in sources])
        torch.testing.assert_close(got[name], expected.float(), rtol=1e-4, atol=1e-5)
    assert ByteTokenizer.load(str(out)).fingerprint == ByteTokenizer.load(models["base"]).fingerprint
    assert math.isfinite(evaluate_model(ModelConfig(model=str(out)), DOCUMENTS)[0].nats)


def test_dare_keeps_or_rescales_each_delta_and_is_drawn_from_the_seed(models: dict[str, str], tmp_path: Path):
    twin = shutil.copytree(models["one"], tmp_path / "twin")
    base = config(models["base"])

    def merged(seed: int) -> np.ndarray:
        out = merge_models(
            "dare", [config(models["one"]), config(twin)], tmp_path / "out", base=base, seed=seed
        )
        return weights(out)[name].numpy()

    name = "model.layers.0.mlp.up_proj.weight"
    delta = (weights(models["one"])[name] - weights(models["base"])[name]).numpy()
    first = merged(0)
    ratio = (first - weights(models["base"])[name].numpy()) / delta
    # Two copies of one model at density 1/2 and weight 1/2: each gives 0, or about 2 · 1/2 of the delta (mergekit
    # rescales to the norm that the tensor had, not by 1 / density).
    ratio = ratio[np.abs(delta) > 0.01]
    assert set(np.unique(np.round(ratio))) == {0.0, 1.0, 2.0}
    assert ratio == pytest.approx(np.round(ratio), abs=0.1)
    assert ratio.mean() == pytest.approx(1.0, abs=0.1)
    assert np.array_equal(first, merged(0))
    assert not np.array_equal(first, merged(1))


def test_models_that_do_not_correspond_are_refused(
    models: dict[str, str], tmp_path: Path, tokenizer_folders: dict[str, Path]
):
    base, one, two, other = (config(models[name]) for name in ("base", "one", "two", "other"))
    with pytest.raises(ConfigError, match="differ in architecture"):
        merge_models("linear", [one, other], tmp_path / "out", base=base)
    with pytest.raises(ConfigError, match="1 model"):
        merge_models("linear", [one], tmp_path / "out", base=base)
    trusted = one.model_copy(update={"trust_remote_code": True})
    with pytest.raises(
        ConfigError, match=r"set for some models and not for .*base; .* each of them, or none"
    ):
        merge_models("linear", [trusted, two], tmp_path / "out", base=base)
    stranger = tmp_path / "stranger"
    shutil.copytree(models["one"], stranger)
    for file in tokenizer_folders["metaspace"].iterdir():
        shutil.copy(file, stranger / file.name)
    with pytest.raises(ConfigError, match="different tokenizers"):
        merge_models("linear", [two, config(stranger)], tmp_path / "out", base=base)


def test_a_merge_takes_the_revisions_it_was_told():
    models = [ModelConfig(model="org/model", revision=revision) for revision in ("first", "second")]
    recipe = MergeConfiguration.model_validate(_recipe("ties", models, ModelConfig(model="org/base"), {}))
    assert {str(model) for model in recipe.referenced_models()} == {
        "org/model@first",
        "org/model@second",
        "org/base",
    }
