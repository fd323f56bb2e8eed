"""No secret gets into a configuration, which is saved with every checkpoint; and no message shows one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fusellm_ray.cli import main
from fusellm_ray.config_file import load_config, parse_config
from fusellm_ray.credentials import find_credentials
from fusellm_ray.errors import ConfigError
from fusellm_ray.study import parse_study

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
        ({"unknown": {"secretAccessKey": SECRET}}, "unknown.secretAccessKey"),
        ({"unknown": {"hf-token": SECRET}}, "unknown.hf-token"),
        ({"unknown": {"apikey": SECRET}}, "unknown.apikey"),
        ({"unknown": {"a.secret_key": SECRET}}, "unknown.a.secret_key"),
        ({"run": {"name": "a", "storage": f"az://box/runs?api_key={SECRET}"}}, "run.storage: a credential"),
        ({"run": {"name": "a", "storage": f"az://box/runs?v=1&account_key={SECRET}"}}, "run.storage: a credential"),
        ({"run": {"name": "a", "storage": f"s3://key:{SECRET}/b@bucket"}}, "run.storage: a user and password"),
        ({"target": {"model": f"https://{SECRET}@host/model"}}, "target.model: a user or token"),
    ],
)  # fmt: skip
def test_a_secret_in_a_config_is_refused_by_its_place_and_never_shown(sections: dict[str, Any], where: str):
    with pytest.raises(ConfigError) as refused:
        parse_config(tree(**sections))
    assert where in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "AKIA" not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        f"teachers.3.engine.args.hf_token=hf_{SECRET}",
        f"run.name.x={SECRET}",
        f"run.storage=[{SECRET}",
        f"run.storage=*{SECRET}",
        f"run.storage=!{SECRET}",
        f"run.storage: {SECRET}",
    ],
)
def test_an_override_that_cannot_be_applied_is_named_without_its_value(tmp_path: Path, override: str):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()))
    with pytest.raises(ConfigError, match=re.escape(re.split("[=:]", override)[0])) as refused:
        load_config(path, [override])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "line", ["storage: *SECRET", "storage: !SECRET x", "SECRET: [", "storage: 'SECRET", "\tSECRET"]
)
def test_a_line_that_is_no_yaml_is_told_by_its_number_and_not_shown(tmp_path: Path, line: str):
    path = tmp_path / "run.yaml"
    path.write_text(f"run:\n  {line.replace('SECRET', SECRET)}\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: .* \(line [23], column \d+\)") as refused:
        load_config(path)
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"storage": f"s3://key:{SECRET}@bucket"}, "storage: a user and password"),
        ({"arms": [{"name": "a", "kind": "model", "model": f"https://{SECRET}@host"}]}, "arms.0.model: a user"),
        ({"arms": [{"name": "a", "set": {"teachers.0.engine.args.hf_token": SECRET}}]}, "engine.args.hf_token"),
        ({"resamples": f"hf_{SECRET}"}, "resamples: a Hugging Face token"),
        ({"base": {"unknown": {"password": SECRET}}}, "base.unknown.password"),
    ],
)  # fmt: skip
def test_a_secret_anywhere_in_a_study_is_refused_before_anything_shows_it(change: dict[str, Any], where: str):
    study = {"name": "s", "against": "a", "base": tree(), "arms": [{"name": "a"}]}
    with pytest.raises(ConfigError, match=where) as refused:
        parse_study(study | change)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_runs_folder_that_holds_a_secret_is_refused_and_not_printed(command: str):
    done = CliRunner().invoke(main, [command, f"s3://key:{SECRET}@bucket/run"])
    assert done.exit_code == 1
    assert "a user and password in a URI" in done.output
    assert SECRET not in done.output


def test_a_secret_in_an_override_is_refused_too(tmp_path: Path):
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
        "abfss://container@account.dfs.core.windows.net/runs",
        "https://store:9000/a@b",
        "https://hub/model@main?revision=a@b",
        "HuggingFaceTB/SmolLM3-3B-Base",
        "data/*.jsonl",
        "0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_holds_no_secret_passes(value: str):
    assert find_credentials(tree(run={"name": "a", "storage": value})) == []


def test_names_about_tokens_as_text_are_no_secrets():
    assert (
        find_credentials(
            {"row_tokens": "64", "tokenizer": "x", "max_num_batched_tokens": "8", "token": "", "key": "k"}
        )
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
