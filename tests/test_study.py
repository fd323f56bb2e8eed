"""Studies: what is refused before anything starts, and how their results are put together."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusellm_ray.config_file import PRESETS
from fusellm_ray.errors import ConfigError
from fusellm_ray.evaluate.comparison import Comparison
from fusellm_ray.perplexity import DocumentScore
from fusellm_ray.study import load_study, parse_study

STUDIES = sorted((Path(__file__).parent.parent / "configs" / "studies").glob("*.yaml"))

TREE: dict[str, Any] = {
    "name": "s",
    "against": "clm",
    "base": {
        "target": {"model": "target"},
        "teachers": [{"name": "a", "model": "A"}, {"name": "b", "model": "B"}],
        "corpus": {"sources": [{"name": "x", "path": "x.jsonl"}]},
        "objective": {"clm_weight": 0.3},
        "training": {"steps": 10, "lr": 0.1},
        "evaluation": {"sources": [{"name": "x", "path": "y.jsonl"}]},
    },
    "arms": [{"name": "clm", "set": {"fusion.rule": "none"}}, {"name": "fused"}],
}


def study(*arms: dict[str, Any], **changes: Any) -> Any:
    tree = copy.deepcopy(TREE) | changes
    tree["arms"] += arms
    return parse_study(tree)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_loads(path: Path):
    loaded = load_study(path)
    assert loaded.name == path.stem
    shared = loaded.config().training.model_dump(exclude={"lr"})  # the same text, in the same steps
    for arm in loaded.arms:
        assert arm.kind != "train" or loaded.config(arm).training.model_dump(exclude={"lr"}) == shared


def test_overrides_reach_the_study_and_its_base(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TREE["base"]))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(TREE | {"base": "base.yaml"}))
    loaded = load_study(tmp_path / "study.yaml", ["seeds=[3, 4]", "base.training.steps=7"])
    assert loaded.seeds == [3, 4]
    assert loaded.config(loaded.arms[1], seed=4).training.steps == 7
    assert loaded.config(loaded.arms[1], seed=4).run.seed == 4


def test_an_arm_changes_what_it_names_and_nothing_else():
    s = study({"name": "kd", "teachers": ["b"], "set": {"fusion.rule": "mean", "teachers.1.top_k": 4}})
    base, config = s.config(), s.config(s.arms[-1])
    assert [(t.name, t.top_k) for t in config.teachers] == [("b", 4)]
    assert config.fusion.rule == "mean"
    assert config.objective == base.objective
    assert (config.training, config.corpus, config.target) == (base.training, base.corpus, base.target)


def test_an_arm_without_training_is_the_very_model_that_training_starts_from():
    base = copy.deepcopy(TREE["base"])
    base["target"] |= {"revision": "v1", "trust_remote_code": True}
    base["teachers"][0]["revision"] = "v2"
    arms = [
        {"name": "untouched", "kind": "model"},
        {"name": "a alone", "kind": "model", "teacher": "a"},
        {"name": "other", "kind": "model", "model": "~/other", "add_bos": True},
    ]
    s = study(*arms, base=base)
    untouched, teacher, other = (s.model(arm) for arm in s.arms[-3:])
    assert (untouched.model, untouched.revision, untouched.trust_remote_code) == ("target", "v1", True)
    assert (teacher.model, teacher.revision) == ("A", "v2")
    assert (other.model, other.add_bos) == (str(Path.home() / "other"), True)


def test_a_preset_replaces_the_method_and_leaves_the_budget():
    s = study({"name": "paper", "preset": "paper"})
    config = s.config(s.arms[-1])
    for section in ("alignment", "fusion", "objective"):
        told = getattr(config, section).model_dump()
        assert {key: told[key] for key in PRESETS["paper"][section]} == PRESETS["paper"][section]
    assert config.training == s.config().training
    assert [teacher.top_k for teacher in config.teachers] == [10, 10]


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ({"name": "clm"}, "two arms are named 'clm'"),
        ({"name": "x", "set": {"training.steps": 20}}, "changes training.steps"),
        ({"name": "x", "set": {"corpus.row_tokens": 64}}, "changes corpus"),
        ({"name": "x", "set": {"fusion.rul": 1}}, "did you mean 'rule'"),
        ({"name": "x", "teachers": ["c"]}, "names teacher 'c'; the base has a, b"),
        ({"name": "x", "kind": "merge"}, "needs a method"),
        (
            {"name": "x", "kind": "merge", "method": "ties", "set": {"a": 1}},
            "set mean nothing for kind merge",
        ),
        ({"name": "x", "kind": "ensemble", "teachers": ["a"]}, "needs two teachers"),
        ({"name": "x", "preset": "papr"}, "preset 'papr' is unknown"),
        ({"name": "x", "knd": "merge"}, "did you mean 'kind'"),
        ({"name": "x", "kind": "model", "teacher": "a", "add_bos": True}, "add_bos is of a model"),
        ({"name": "x", "set": {"run.seed": 3}}, "'run.seed' means nothing"),
        ({"name": "a+b"}, "should match pattern"),
    ],
)
def test_a_study_that_cannot_be_compared_is_refused(arm: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        study(arm)


def test_a_study_whose_arms_may_end_early_is_refused():
    evaluation = TREE["base"]["evaluation"] | {"every_steps": 2}
    with pytest.raises(ConfigError, match=r"arm 'x' has training\.early_stop"):
        study(
            {"name": "x", "set": {"training.early_stop": {"patience": 1}}},
            base=TREE["base"] | {"evaluation": evaluation},
        )
    training = TREE["base"]["training"] | {"early_stop": {"patience": 1}}
    with pytest.raises(ConfigError, match=r"arm 'clm' has training\.early_stop"):
        study(base=TREE["base"] | {"evaluation": evaluation, "training": training})


def test_the_arm_compared_with_and_the_held_out_text_must_be_there():
    with pytest.raises(ConfigError, match="none of the arms: clm, fused"):
        study(against="other")
    with pytest.raises(ConfigError, match="sources is empty"):
        study(base=TREE["base"] | {"evaluation": {}})


# ------------------------------------------------------------------------------------ results


def documents(bits: float, count: int = 10) -> list[DocumentScore]:
    """`count` documents in each of two domains, the second one bit harder."""
    return [
        DocumentScore(domain, f"{domain}:{i}", (bits + extra) * math.log(2) * (100 + i), 100 + i, 30)
        for domain, extra in (("x", 0.0), ("y", 1.0))
        for i in range(count)
    ]


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        name="s",
        against="clm",
        scores={
            "base": {0: documents(3.0)},
            "clm": {0: documents(2.0), 1: documents(2.2)},
            "ours": {0: documents(1.9), 1: documents(2.0)},
        },
        details={name: {"kind": "train"} for name in ("base", "clm", "ours")},
        num_resamples=50,
        fixed=frozenset({"base"}),
    )


def test_means_and_spreads_are_over_seeds_and_differences_of_seed_averages(comparison: Comparison):
    assert comparison.mean("ours", "x") == pytest.approx(1.95)
    assert comparison.mean("ours", "mean") == pytest.approx(2.45)
    assert comparison.spread("clm", "mean") == pytest.approx(0.2 / math.sqrt(2))
    assert comparison.spread("base", "mean") is None
    interval = comparison.differences["ours"]["mean"]
    assert [interval.difference, interval.low, interval.high] == pytest.approx([-0.15] * 3)
    assert comparison.by_seed("ours") == pytest.approx({0: -0.1, 1: -0.2})


def test_the_table_and_the_json_say_the_same(comparison: Comparison):
    told = comparison.as_json()
    ours = told["models"]["ours"]
    assert ours["mean"] == pytest.approx(2.45)
    assert {name: score["bits_per_byte"] for name, score in ours["domains"].items()} == pytest.approx(
        {"x": 1.95, "y": 2.95}
    )
    assert ours["seeds"]["1"]["mean"] == pytest.approx(2.5)
    assert told["differences"]["ours"]["y"]["low"] == pytest.approx(-0.15)
    text = comparison.markdown()
    assert "| ours | **1.9500** | **2.9500** | **2.4500 ± 0.0707** | -0.1500 (-0.1500 to -0.1500) |" in text
    assert "| clm | 2.1000 | 3.1000 | 2.6000 ± 0.1414 |  |" in text


def without(comparison: Comparison, arm: str, *seeds: int) -> Comparison:
    """Without these seeds of an arm; without all of them, without the arm."""
    scores = {name: dict(by_seed) for name, by_seed in comparison.scores.items()}
    for seed in seeds:
        del scores[arm][seed]
    return replace(comparison, scores={name: by_seed for name, by_seed in scores.items() if by_seed})


def test_arms_of_an_unfinished_study_are_compared_over_the_seeds_that_both_have(comparison: Comparison):
    part = without(comparison, "ours", 0)
    # Seed 1: 2.0 against 2.2. The base, which draws nothing at random, stays with both seeds of clm.
    assert part.differences["ours"]["x"].difference == pytest.approx(-0.2)
    assert part.differences["base"]["x"].difference == pytest.approx(0.9)
    text = part.markdown()
    assert "differences over the n that both have" in text
    assert "2.5000**, n = 1" in text or "2.5000, n = 1" in text
    assert "-0.2000 (-0.2000 to -0.2000), n = 1" in text
    assert "+0.9000 (+0.9000 to +0.9000), n = 2" in text
    # No seed in common.
    apart = without(without(comparison, "ours", 0), "clm", 1)
    assert "ours" not in apart.differences
    assert "ours" in apart.markdown()


def test_without_the_arm_compared_with_there_is_a_table_without_differences(comparison: Comparison):
    part = replace(without(comparison, "clm", 0, 1), failures={"clm, seed 0": "ModelError: gone"})
    told, text = part.as_json(), part.markdown()
    assert told["models"]["ours"]["mean"] == pytest.approx(2.45)
    assert told["differences"] == {}
    assert told["failures"] == {"clm, seed 0": "ModelError: gone"}
    assert "| ours | **1.9500** |" in text
    assert "Failed, and missing above:\n\n- clm, seed 0: ModelError: gone" in text
