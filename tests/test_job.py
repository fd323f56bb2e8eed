"""A run as a job of a running cluster with token authentication, watched and stopped from another terminal."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusellm_ray.exposure import is_open
from fusellm_ray.target.storage import Checkpoints
from tests.head import Head, free_ports
from tests.runs import build_run, of_event

GRAFANA = Path(__file__).parents[1] / "deploy" / "grafana"
STOP_WAIT = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}})


@dataclass
class Job:
    """A job and the `ray job submit` that follows it."""

    name: str
    client: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, pattern: str, timeout: float = 500) -> re.Match[str]:
        """Wait until the job's log, as its submitter sees it, has something."""
        deadline = time.monotonic() + timeout
        while True:
            is_over = self.client.poll() is not None or time.monotonic() > deadline
            text = self.log.read_text()
            match = re.search(pattern, text)
            if match:
                return match
            assert not is_over, f"{pattern} is not in the log of {self.name}\n{text[-5000:]}"
            time.sleep(0.2)


def submit(head: Head, name: str, folder: Path, *command: str) -> Job:
    log = folder.parent / f"{name}.log"
    submission = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--submission-id", name]
    submission += ["--runtime-env-json", STOP_WAIT, "--working-dir", ".", "--", *command]
    with log.open("w") as out:
        environment = head.environment | {"RAY_ADDRESS": head.dashboard}
        client = subprocess.Popen(
            submission, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    return Job(name, client, log)


def ask(head: Head, path: str, token: str | None) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{head.dashboard}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, Any]:
    """A run that lasts until it is stopped."""
    folder = tmp_path_factory.mktemp("run")
    held_out = {"name": "prose", "path": str(folder / "prose.jsonl")}
    return build_run(
        folder,
        tokenizer_folders,
        evaluation={"sources": [held_out], "every_steps": 50, "max_bytes": 2000},
        training={"steps": 1_000_000, "schedule": "constant", "warmup_ratio": 0.0},
        checkpoint={"every_steps": 1_000_000},
    )


@pytest.fixture(scope="module")
def folder(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the jobs are submitted with."""
    folder = tmp_path_factory.mktemp("jobs") / "submitted"
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    (folder / "wrong.yaml").write_text(yaml.safe_dump(tree | {"trainning": {}}))
    return folder


@pytest.fixture(scope="module")
def live(ray_head: Head, folder: Path) -> Iterator[Job]:
    """The run, training."""
    job = submit(ray_head, "live", folder, "fusellm-ray", "train", "run.yaml")
    job.wait_for("step 2/1000000 ")
    yield job
    ray_head.ray("job", "stop", job.name)
    job.client.wait(timeout=180)


@pytest.fixture(scope="module")
def stopped(ray_head: Head, live: Job) -> str:
    """What `ray job stop` ended with, and what stood in the log by then."""
    result = ray_head.ray("job", "stop", live.name)
    assert result.returncode == 0, result.stdout + result.stderr
    live.client.wait(timeout=180)
    return live.log.read_text()


@pytest.fixture(scope="module")
def prometheus(ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus with the example's configuration, in a hurry."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("no prometheus on the PATH; Debian has it as a package of that name")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((GRAFANA / "prometheus.yaml").read_text())
    (ray,) = config["scrape_configs"]
    (discovery,) = ray["file_sd_configs"]
    (file,) = discovery["files"]
    discovery |= {"files": [str(ray_head.folder / Path(file).name)], "refresh_interval": "1s"}
    ray["scrape_interval"] = "1s"
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        binary,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)


def test_without_the_token_the_cluster_answers_nothing(ray_head: Head, live: Job):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(ray_head, "/api/jobs/", token=None)
    assert ask(ray_head, f"/api/jobs/{live.name}", ray_head.token)["status"] == "RUNNING"


def test_check_warns_only_of_a_dashboard_that_answers_without_a_token(ray_head: Head, folder: Path):
    command = [sys.executable, "-m", "fusellm_ray.cli", "check", "run.yaml"]
    checked = subprocess.run(
        command, capture_output=True, text=True, env=ray_head.environment, cwd=folder, timeout=300
    )
    assert checked.returncode == 0, checked.stderr
    assert "nothing stands against this run" in checked.stdout
    assert "warning" not in checked.stdout
    assert not is_open(ray_head.dashboard)


def test_check_with_a_wrong_token_says_so(ray_head: Head, folder: Path):
    command = [sys.executable, "-m", "fusellm_ray.cli", "check", "run.yaml"]
    environment = ray_head.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    checked = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300
    )
    assert checked.returncode == 1
    assert "ClusterError: RAY_ADDRESS=" in checked.stderr
    assert "Traceback" not in checked.stderr


def test_a_jobs_log_has_a_line_a_step_while_it_runs(live: Job):
    match = live.wait_for(r"step 3/1000000  loss \d+\.\d+ .*wins left \d+% right \d+%")
    assert live.client.poll() is None, match


def test_every_role_gives_ray_its_name_for_the_log(ray_head: Head, live: Job):
    logs = (ray_head.folder / "session_latest" / "logs").glob("worker-*.err")
    named = {line for log in logs for line in log.read_text().splitlines() if line.startswith(":actor_name:")}
    wanted = {
        "pools of left, right",
        "teacher left, replica 0",
        "teacher right, replica 0",
        "rank 0",
        "rank 1",
    }
    assert named >= {f":actor_name:{name}" for name in wanted}


def status(head: Head, *args: str) -> str:
    """What `fusellm-ray status` says in another terminal."""
    command = [sys.executable, "-m", "fusellm_ray.cli", "status", *args]
    result = subprocess.run(command, capture_output=True, text=True, env=head.environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_another_terminal_sees_how_the_run_stands(ray_head: Head, live: Job, folder: Path):
    text = status(ray_head, str(folder / "run.yaml"))
    assert re.search(r"training: step \d+ of 1000000", text), text
    for shown in ("win share", "left", "right", "last record"):
        assert shown in text


def test_every_panel_of_the_dashboard_shows_the_live_run(live: Job, prometheus: str):
    dashboard = json.loads((GRAFANA / "fusellm-ray.json").read_text())
    queries = {
        f"{panel['title']}: {target['expr']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    assert len(queries) >= 20
    deadline = time.monotonic() + 120
    missing = dict(queries)
    while missing and time.monotonic() < deadline:
        time.sleep(1)
        missing = {at: query for at, query in missing.items() if not figures(prometheus, query)}
    assert list(missing) == []
    for variable in dashboard["templating"]["list"][1:]:
        (metric, label), (wanted,) = (
            re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups(),  # type: ignore[union-attr]
            [{"run": {"run"}, "teacher": {"left", "right"}}[variable["name"]]],
        )
        assert {series["metric"][label] for series in figures(prometheus, metric)} == wanted


def figures(prometheus: str, query: str) -> list[dict[str, Any]]:
    """The series with a number that a panel's query gives now."""
    for name, value in {"$run": ".*", "$teacher": ".*", "$__rate_interval": "20s"}.items():
        query = query.replace(name, value)
    address = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            series = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}\n{error.read().decode()}") from error
    except OSError:  # it is starting
        return []
    return [each for each in series if math.isfinite(float(each["value"][1]))]


def test_stopping_a_job_saves_a_checkpoint_first(
    ray_head: Head, live: Job, stopped: str, tree: dict[str, Any]
):
    assert ask(ray_head, f"/api/jobs/{live.name}", ray_head.token)["status"] == "STOPPED"
    end = re.search(r"end  step (\d+)  reason SIGTERM", stopped)
    assert end is not None, stopped[-3000:]
    assert Checkpoints(tree["run"]["storage"], "run").steps() == [int(end[1])]
    run_folder = Path(tree["run"]["storage"]) / "run"
    assert f"stopped at step {end[1]} (SIGTERM)" in " ".join(status(ray_head, str(run_folder)).split())
    actors = ask(ray_head, "/api/v0/actors", ray_head.token)["data"]["result"]["result"]
    alive = {actor["class_name"] for actor in actors if actor["state"] != "DEAD"}
    assert alive <= {"_AutoscalingCoordinatorActor"}  # Ray Train's, one a cluster


def test_the_same_job_submitted_again_goes_on_and_succeeds(
    ray_head: Head, folder: Path, stopped: str, tree: dict[str, Any]
):
    (saved,) = Checkpoints(tree["run"]["storage"], "run").steps()
    last = saved + 2
    again = submit(ray_head, "again", folder, "fusellm-ray", "train", "run.yaml", f"training.steps={last}")
    assert again.client.wait(timeout=550) == 0, again.log.read_text()[-5000:]
    text = again.log.read_text()
    assert f"start  step {saved}" in text
    assert f"end  step {last}  reason finished" in text
    assert ask(ray_head, "/api/jobs/again", ray_head.token)["status"] == "SUCCEEDED"
    lines = (Path(tree["run"]["storage"]) / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in of_event(map(json.loads, lines), "step")]
    assert steps == list(range(1, last + 1))


def test_a_job_that_cannot_work_fails_with_the_message_in_its_log(ray_head: Head, folder: Path):
    failed = submit(ray_head, "wrong", folder, "fusellm-ray", "train", "wrong.yaml")
    assert failed.client.wait(timeout=500) == 1
    assert "did you mean 'training'?" in failed.log.read_text()
    status = ask(ray_head, "/api/jobs/wrong", ray_head.token)
    assert (status["status"], status["driver_exit_code"]) == ("FAILED", 1)
