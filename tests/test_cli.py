"""The command line as a user meets it: real processes, exit codes, messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fusellm_ray.cli import main


def fusellm(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusellm_ray.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_help_answers_before_anything_heavy_is_imported():
    code = "import sys; from fusellm_ray.cli import main; main(['--help'], standalone_mode=False); "
    code += "print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("'torch'", "'ray'", "'transformers'", "'vllm'", "'numpy'"):
        assert heavy not in result.stdout


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help(command: str):
    result = fusellm(command, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


def test_a_bad_config_is_one_message_without_a_traceback(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": {"name": "a"}, "trainning": {}}))
    result = fusellm("check", str(path))
    assert result.returncode == 1
    assert "did you mean 'training'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_error_that_ends_a_run_with_structured_logs_is_an_object_too(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": {"name": "a"}, "trainning": {}}))
    result = fusellm("train", str(path), "--log-format", "json")
    assert result.returncode == 1
    (line,) = map(json.loads, result.stderr.splitlines())
    assert (line["role"], line["run"], line["event"], line["error"]) == (
        "driver",
        str(path),
        "error",
        "ConfigError",
    )
    assert "did you mean 'training'?" in line["text"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["evaluate", "model", "--json", "absent/scores.json"], "absent is no folder that can be written to"),
        (["quickstart", "--json", "."], "is a directory"),
        (["merge", "a", "b", "--base", "c", "--into", "file"], "file exists and is not an empty folder"),
        (["export", "run.yaml", "--into", "full"], "full exists and is not an empty folder"),
        (["export", "run.yaml", "--into", "../empty"], "is where this command runs"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], says: str
):
    here = tmp_path / "empty"
    here.mkdir()
    if says.startswith(("file", "full")):
        (here / "full").mkdir()
        for name in ("file", "full/file"):
            (here / name).write_text("")
    monkeypatch.chdir(here)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert says in result.output
