"""No secret gets into a configuration, which is saved with every checkpoint; and no message shows one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusellm_ray.config import load_config, parse_config
from fusellm_ray.credentials import find_credentials
from fusellm_ray.errors import ConfigError

SECRET = "Zk8vQ2mX7pLr4TnW9sYb3HdC6fGj"
LETTERS = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789"), min_size=20, max_size=40)


def tree(**sections: Any) -> dict[str, Any]:
    known = {
        "run": {"name": "a"},
        "target": {"model": "m"},
        "teachers": [{"name": "t", "model": "n", "engine": {"type": "vllm"}}],
        "corpus": {"sources": [{"name": "s", "path": "p"}]},
        "training": {"steps": 1},
    }
    return known | sections


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"run": {"name": "a", "storage": f"s3://key:{SECRET}@bucket/runs"}}, "run.storage: a user and password"),
        ({"run": {"name": "a", "storage": f"s3://bucket/runs?secret_key={SECRET}"}}, "run.storage: a credential"),
        ({"run": {"name": "a", "storage": f"az://box/runs?sv=2&sig={SECRET}"}}, "run.storage: a credential"),
        ({"target": {"model": f"https://user:{SECRET}@host/model"}}, "target.model: a user and password"),
        ({"teachers": [{"name": "t", "engine": {"args": {"hf_token": SECRET}}}]}, "teachers.0.engine.args.hf_token"),
        ({"teachers": [{"name": "t", "engine": {"args": {"x": f"hf_{SECRET}"}}}]}, "engine.args.x: a Hugging Face"),
        ({"teachers": [{"name": "t", "engine": {"args": {"x": "AKIAIOSFODNN7EXAMPLE"}}}]}, "x: an AWS access key"),
        ({"unknown": {"password": SECRET}}, "unknown.password"),
    ],
)  # fmt: skip
def test_a_secret_in_a_config_is_refused_by_its_place_and_never_shown(sections: dict[str, Any], where: str):
    with pytest.raises(ConfigError) as refused:
        parse_config(tree(**sections))
    assert where in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "AKIA" not in str(refused.value)


def test_a_secret_in_an_override_is_refused_too(tmp_path: Any):
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: a}")
    with pytest.raises(ConfigError, match=r"run\.storage: a user and password") as refused:
        load_config(path, [f"run.storage=s3://key:{SECRET}@bucket"])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/runs",
        "s3://bucket/runs?region=eu-west-1&endpoint_override=http://store:9000",
        "gs://bucket/a@b",
        "HuggingFaceTB/SmolLM3-3B-Base",
        "data/*.jsonl",
        "0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_holds_no_secret_passes(value: str):
    assert find_credentials(tree(run={"name": "a", "storage": value})) == []


def test_names_about_tokens_as_text_are_no_secrets():
    assert (
        find_credentials({"row_tokens": "64", "tokenizer": "x", "max_num_batched_tokens": "8", "token": ""})
        == []
    )


@given(secret=LETTERS, depth=st.integers(0, 4))
def test_a_token_is_found_at_any_depth_and_its_value_is_not_repeated(secret: str, depth: int):
    node: Any = f"--flag=hf_{secret}"
    for level in range(depth):
        node = [node] if level % 2 else {"key": node}
    ((path, kind),) = find_credentials({"root": node})
    assert path.startswith("root")
    assert kind == "a Hugging Face token"
    assert secret not in path
