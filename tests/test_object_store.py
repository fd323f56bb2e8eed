"""A run whose storage is an S3 bucket behind a URI with a query; the server checks every request's signature."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.fs
import pytest
import yaml
from click.testing import CliRunner

from fusellm_ray.cli import main
from fusellm_ray.config import Config, ModelConfig
from fusellm_ray.config_file import load_config
from fusellm_ray.errors import CheckpointError, ConfigError
from fusellm_ray.folders import below
from fusellm_ray.job import export_run, run_job
from fusellm_ray.observe.records import RecordLog, read_records
from fusellm_ray.perplexity import by_domain, evaluate_model, held_out_documents
from fusellm_ray.target.storage import Checkpoints, best_folder, step_folder
from tests.faults import same_bits, weights
from tests.head import free_ports
from tests.runs import build_run, losses, named, of_event
from tests.test_storage import FILES, state_text

SETUP = {"region_name": "us-east-1", "aws_access_key_id": "setup", "aws_secret_access_key": "setup"}
POLICY = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server that is set up, and from then on wants every request signed by a key it gave out."""
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("s3") / "server.log"
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "4"},  # those of `storage`
        )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not answers(f"{endpoint}/moto-api/"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield endpoint
    finally:
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture(scope="module")
def storage(endpoint: str) -> Iterator[str]:
    """`run.storage`, with the environment that gives access to it."""
    iam = boto3.client("iam", endpoint_url=endpoint, **SETUP)
    iam.create_user(UserName="trainer")
    iam.put_user_policy(UserName="trainer", PolicyName="s3", PolicyDocument=json.dumps(POLICY))
    key = iam.create_access_key(UserName="trainer")["AccessKey"]
    boto3.client("s3", endpoint_url=endpoint, **SETUP).create_bucket(Bucket="bucket")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        environment.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        environment.delenv("AWS_SESSION_TOKEN", raising=False)
        yield f"s3://bucket/runs?region=us-east-1&endpoint_override={endpoint}"


@pytest.fixture
def run(storage: str, tokenizer_folders: dict[str, Path], tmp_path: Path) -> Path:
    """The file of a run without teachers."""
    tree = build_run(
        tmp_path,
        tokenizer_folders,
        run={"storage": storage},
        teachers=[],
        fusion={"rule": "none"},
        training={"schedule": "constant", "warmup_ratio": 0.0, "steps": 5},
        checkpoint={"every_steps": 1, "keep": 2, "keep_best": True},
    )
    tree["evaluation"] = {"sources": tree["corpus"]["sources"], "every_steps": 1, "max_bytes": 1000}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url):
        return True
    return False


def train(*args: str) -> None:
    """In a process of its own, whose ranks have its environment."""
    command = [sys.executable, "-m", "fusellm_ray.cli", "train", *args]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


def names(folder: str) -> set[str]:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    return {entry.base_name for entry in filesystem.get_file_info(pyarrow.fs.FileSelector(path))}


def mean_bits_per_byte(model: Path, config: Config) -> float:
    documents = held_out_documents(config.evaluation.sources, config.evaluation.max_bytes)
    scores = by_domain(
        evaluate_model(ModelConfig(model=str(model)), documents, row_tokens=config.corpus.row_tokens)
    )
    return sum(score.bits_per_byte for score in scores.values()) / len(scores)


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_keeps_its_latest_and_best_and_is_watched_and_exported(
    run: Path, storage: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(str(run), "training.steps=3")
    train(str(run))

    config, folder = load_config(run), below(storage, "run")
    records = read_records(folder)
    assert [r["step"] for r in of_event(records, "start")] == [0, 3]
    bits = {r["step"]: r["bits_per_byte"] for r in of_event(records, "evaluation")}
    best = min(bits, key=lambda step: bits[step])
    assert Checkpoints(storage, "run").steps() == [4, 5]
    kept = {name for name in names(folder) if name.startswith(("step_", "best_"))}
    assert kept == {step_folder(4), step_folder(5), best_folder(best)}

    monkeypatch.chdir(tmp_path)
    for named_by in (str(run), folder):
        shown = CliRunner().invoke(main, ["status", named_by])
        assert "finished at step 5" in shown.output
        assert CliRunner().invoke(main, ["report", named_by]).output == "wrote run.html\n"
        (tmp_path / "run.html").unlink()

    exported = export_run(config, tmp_path / "best", step="best")
    assert mean_bits_per_byte(exported, config) == pytest.approx(bits[best], rel=1e-5)
    tree = yaml.safe_load(run.read_text())
    tree["run"] = {"storage": str(tmp_path / "local")}
    local = named(tree, "run")
    assert run_job(local).is_finished
    assert losses(records) == losses(read_records(str(tmp_path / "local" / "run")))
    assert same_bits(weights(config, tmp_path / "last"), weights(local, tmp_path / "wanted"))


def test_in_a_bucket_a_checkpoint_counts_once_its_last_file_has_arrived(storage: str) -> None:
    filesystem, root = pyarrow.fs.FileSystem.from_uri(storage)
    checkpoints = Checkpoints(storage, "arriving")
    assert checkpoints.latest_state() is None
    files = {name: content.decode() for name, content in FILES.items()} | {"state.json": state_text(7)}
    for name, content in files.items():
        assert checkpoints.steps() == []
        filesystem.create_dir(f"{root}/arriving/{step_folder(7)}")
        with filesystem.open_output_stream(f"{root}/arriving/{step_folder(7)}/{name}") as stream:
            stream.write(content.encode())
    with checkpoints.local_copy() as directory:
        assert {path.name: path.read_text() for path in directory.iterdir()} == files


def test_a_record_in_a_bucket_is_there_from_its_first_line(storage: str) -> None:
    folder = below(storage, "recorded")
    for number in (1, 2):
        with RecordLog(folder) as log:
            log.write({"event": "start", "step": number})
            assert read_records(folder)[-1]["event"] == "start"
            log.write({"event": "end", "step": number})
    assert [(r["event"], r["step"]) for r in read_records(folder)] == [
        (event, number) for number in (1, 2) for event in ("start", "end")
    ]


def test_a_bucket_that_is_not_there_is_refused_before_anything_starts(run: Path, storage: str) -> None:
    elsewhere = storage.replace("s3://bucket", "s3://other")
    with pytest.raises(ConfigError, match=r"s3://other/runs/run\?.*cannot be written.*see that run\.storage"):
        run_job(load_config(run, [f"run.storage={elsewhere}"]))


def test_a_bucket_that_the_environments_credentials_do_not_open_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(CheckpointError, match=r"cannot be read.*SIGNATURE.*credentials in the environment"):
        run_job(load_config(run))
