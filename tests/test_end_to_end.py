"""Whole runs on real Ray: train, resume, stop by signal, export; what is compared are weights and losses."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusellm_ray.config import Config, ModelConfig
from fusellm_ray.config_file import parse_config
from fusellm_ray.errors import CheckpointError, ClusterError, ConfigError, ModelError
from fusellm_ray.job import Outcome, export_run, run_job
from fusellm_ray.observe.progress import Display
from fusellm_ray.observe.records import History, read_records
from fusellm_ray.observe.status import state_of
from fusellm_ray.perplexity import by_domain, evaluate_model, held_out_documents
from fusellm_ray.plan import make_plan
from fusellm_ray.target.storage import Checkpoints
from fusellm_ray.teachers.service import start_pools, stop_pools
from tests.faults import own_processes, same_bits, weights
from tests.runs import build_run, losses, named, of_event

CONSTANT = {"schedule": "constant", "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, Any]:
    return build_run(tmp_path_factory.mktemp("run"), tokenizer_folders, training=CONSTANT)


@pytest.fixture(scope="module")
def pools(tree: dict[str, Any], ray_session: None) -> Iterator[dict[str, Any]]:
    """The teachers, up once for all runs of this module that share a Ray session."""
    pools = start_pools(parse_config(tree))
    yield pools
    stop_pools(pools)


@pytest.fixture(scope="module")
def undisturbed(tree: dict[str, Any], pools: dict[str, Any]) -> Config:
    config = named(tree, "undisturbed")
    outcome = run_job(config, pools=pools)
    assert outcome.is_finished
    assert outcome.step == 6
    return config


def _corpus_lines(config: Config) -> list[str]:
    return [line for s in config.corpus.sources for line in Path(s.path or "").read_text().splitlines()]


def records_of(config: Config) -> list[dict[str, Any]]:
    return read_records(Checkpoints(config.run.storage, config.run.name).folder)


class Noting(Display):
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_every_step_is_recorded_with_each_teachers_figures(undisturbed: Config):
    steps = of_event(records_of(undisturbed), "step")
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        shares = [record[f"teacher/{name}/win_share"] for name in ("left", "right")]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        for name in ("left", "right"):
            assert record[f"teacher/{name}/coverage"] > 0.8
            assert record[f"teacher/{name}/fidelity"] == pytest.approx(1, abs=0.05)
        assert record["loss"] > 0


def test_export_is_what_auto_classes_load_and_has_learnt_its_text(undisturbed: Config, tmp_path: Path):
    folder = export_run(undisturbed, tmp_path / "export")
    text = "\n".join(json.loads(line)["text"] for line in _corpus_lines(undisturbed))
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    rows = ids[: 64 * 64].view(-1, 64)

    def loss(model: str | Path) -> float:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(model)(rows, labels=rows).loss.item()

    assert loss(folder) < loss(undisturbed.target.model)
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_run(undisturbed, tmp_path / "export")


def test_an_elastic_resume_on_the_one_rank_that_there_is_room_for_goes_on_with_the_same_batches(
    tree: dict[str, Any], pools: dict[str, Any], undisturbed: Config
):
    first = named(tree, "resumed", training={"steps": 3})
    assert run_job(first, pools=pools).step == 3
    # The session's node has one train_slot.
    elastic = {"workers": {"min": 1, "max": 3}, "resources_per_worker": {"CPU": 0.2, "train_slot": 1}}
    second = named(tree, "resumed", trainer=elastic)
    assert run_job(second, pools=pools).is_finished
    records = records_of(second)
    assert [r["step"] for r in of_event(records, "step")] == [1, 2, 3, 4, 5, 6]
    assert [r["ranks"] for r in of_event(records, "start")] == [2, 1]
    assert losses(records) == pytest.approx(losses(records_of(undisturbed)), rel=1e-6)


class KillRank(Display):
    """A display that ends one of two ranks' processes, as the kernel would, when a step is recorded."""

    def __init__(self, at_step: int, index: int) -> None:
        self._at_step = at_step
        self._index = index
        self.starts: list[int] = []
        self.controllers: list[int] = []

    def show(self, record: dict[str, Any]) -> None:
        if record["event"] == "start":
            self.starts.append(record["step"])
            self.controllers = own_processes("ray::TrainController")
        if record["event"] == "step" and record["step"] == self._at_step and len(self.starts) == 1:
            ranks = [psutil.Process(pid) for pid in own_processes("ray::RayTrainWorker")]
            # Those of a run before this one may not be gone yet.
            sorted(ranks, key=psutil.Process.create_time)[-2:][self._index].kill()


def test_a_killed_rank_comes_back_and_the_weights_are_those_of_an_undisturbed_run(
    tree: dict[str, Any], pools: dict[str, Any], undisturbed: Config, tmp_path: Path
):
    # An evaluation each step: steps then last long enough for the driver to hear of one before the last is over.
    config = named(
        tree,
        "killed",
        trainer={"max_failures": 1},
        checkpoint={"every_steps": 3},
        evaluation={"sources": tree["corpus"]["sources"], "every_steps": 1, "max_bytes": 10_000},
    )
    step, index = random.randint(1, 3), random.randrange(2)
    drawn = f"rank process {index} of 2 killed at step {step}"
    killer = KillRank(step, index)
    assert run_job(config, pools=pools, display=killer).is_finished, drawn
    assert len(killer.starts) == 2, f"{drawn}, once"
    assert len(killer.controllers) == 1, drawn
    assert not own_processes("ray::TrainController"), f"{drawn}; it ends with its run, not with Ray"
    assert killer.starts[1] < 6, drawn
    assert losses(records_of(config)) == losses(records_of(undisturbed)), drawn
    assert same_bits(weights(config, tmp_path / "killed"), weights(undisturbed, tmp_path / "undisturbed")), (
        drawn
    )


def test_a_run_that_no_longer_improves_ends_finished_with_samples_and_its_best_model(
    tree: dict[str, Any], pools: dict[str, Any], tmp_path: Path
):
    evaluated = {
        "sources": tree["corpus"]["sources"],
        "every_steps": 1,
        "max_bytes": 1000,
        "prompts": ["def f(x):", "The"],
        "sample_tokens": 4,
    }
    early = {"early_stop": {"patience": 2, "min_delta": 100.0}}  # so that no evaluation is an improvement
    config = named(tree, "early", training=early, evaluation=evaluated, checkpoint={"keep_best": True})
    assert run_job(config, pools=pools) == Outcome(step=3, is_finished=True)
    records = records_of(config)
    assert run_job(config, pools=pools) == Outcome(step=3, is_finished=True)
    bits = {r["step"]: r["bits_per_byte"] for r in of_event(records, "evaluation")}
    assert list(bits) == [1, 2, 3]
    assert [(r["step"], r["prompt"]) for r in of_event(records, "sample")] == [
        (number, prompt) for number in bits for prompt in evaluated["prompts"]
    ]
    (end,) = of_event(records, "end")
    assert "no longer improve" in end["reason"]
    best = export_run(config, tmp_path / "best", step="best")
    documents = held_out_documents(config.evaluation.sources, 1000)
    scores = by_domain(
        evaluate_model(ModelConfig(model=str(best)), documents, row_tokens=config.corpus.row_tokens)
    )
    mean = sum(score.bits_per_byte for score in scores.values()) / len(scores)
    assert mean == pytest.approx(min(bits.values()), rel=1e-5)


def test_a_finished_run_with_another_configuration_is_refused_by_name(
    tree: dict[str, Any], undisturbed: Config
):
    left, right = tree["teachers"]
    changed = {
        "target.lora.rank: was absent, is 4": named(tree, "undisturbed", target={"lora": {"rank": 4}}),
        "teachers.left.top_k: was 8, is 4": named(
            tree | {"teachers": [left | {"top_k": 4}, right]}, "undisturbed"
        ),
        "seed: was 0, is 1": parse_config(tree | {"run": tree["run"] | {"name": "undisturbed", "seed": 1}}),
    }
    for said, config in changed.items():
        for ask in (run_job, make_plan):
            with pytest.raises(CheckpointError, match=f"of step 6 belongs to another run:\n  {said}\n"):
                ask(config)


def test_a_finished_run_is_left_alone(undisturbed: Config):
    before = records_of(undisturbed)
    assert run_job(undisturbed).is_finished
    assert records_of(undisturbed) == before


def test_a_resume_refuses_another_corpus_and_says_what_changed(
    tree: dict[str, Any], pools: dict[str, Any], undisturbed: Config
):
    sources = tree["corpus"]["sources"][:1]
    changed = named(tree, "undisturbed", training={"steps": 8}, corpus={"sources": sources})
    with pytest.raises(CheckpointError, match=r"corpus\.sources\.code\.path: was .*, is absent"):
        run_job(changed, pools=pools)


def test_a_resume_refuses_changed_text_and_weights_under_their_old_names_unless_told_otherwise(
    tree: dict[str, Any], pools: dict[str, Any], tmp_path: Path
):
    corpus, target = tmp_path / "prose.jsonl", tmp_path / "target"
    lines = Path(tree["corpus"]["sources"][0]["path"]).read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines))
    shutil.copytree(tree["target"]["model"], target)
    sections = {
        "target": {"model": str(target)},
        "corpus": {"sources": [{"name": "prose", "path": str(corpus)}]},
    }
    assert run_job(named(tree, "changed", training={"steps": 3}, **sections), pools=pools).step == 3
    corpus.write_text("".join(reversed(lines[:6])))
    tensors = load_file(target / "model.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )

    resumed = named(tree, "changed", training={"steps": 6, "batch_rows": 2}, **sections)
    with pytest.raises(CheckpointError) as refused:
        run_job(resumed)
    for key in ("target.weights", "corpus.sources.prose.text", "batch_rows"):
        assert f"\n  {key}: was " in str(refused.value)
    seen = Noting()
    assert run_job(resumed, pools=pools, allow_changes=True, display=seen).is_finished
    assert any("batch_rows: was 4, is 2" in note for note in seen.notes)
    assert any("read from its beginning" in note for note in seen.notes)


def test_losses_that_are_no_numbers_are_skipped_then_end_the_run_naming_documents(
    tree: dict[str, Any], pools: dict[str, Any]
):
    diverging = {"lr": 1e30, "steps": 6, "max_skipped_steps": 1, "clip_norm": 1e30, "weight_decay": 0}
    config = named(tree, "diverged", training=diverging)
    with pytest.raises(ModelError, match=r"not finite, for the 2\. time.*documents: rank 0: .*jsonl"):
        run_job(config, pools=pools)
    assert max(losses(records_of(config))) >= 2


def test_more_than_this_machine_has_is_refused_at_once_and_recorded(tree: dict[str, Any], ray_session: None):
    greedy = named(tree, "greedy", trainer={"resources_per_worker": {"CPU": 1000}})
    with pytest.raises(ClusterError, match=r"CPU: asked 2000.*there 8"):
        run_job(greedy)
    assert state_of(History.of(records_of(greedy)), time.time()).text.startswith("failed: ")


def test_rows_longer_than_the_target_reads_are_refused(tree: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"row_tokens=129 exceeds .*128"):
        run_job(named(tree, "long", corpus={"row_tokens": 129}))


def test_top_k_over_the_vocabulary_is_refused(tree: dict[str, Any]):
    teachers = [tree["teachers"][0] | {"top_k": 5000}]
    with pytest.raises(
        ConfigError, match=r"teachers\[0\].top_k=5000 exceeds the vocabulary of left \(1200\)"
    ):
        run_job(parse_config(tree | {"teachers": teachers}))


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses at which they take connections; ranks aside, as torch's rendezvous takes them from everywhere."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not process.name().startswith("ray::RayTrainWo"):
                connections = process.net_connections("inet")
                found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def test_a_private_ray_has_no_process_that_nobody_asks(ray_session: None):
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert any("raylet" in command for command in commands)
    for idle in ("log_monitor.py", "autoscaler/_private/monitor.py", "dashboard/dashboard.py"):
        assert not [command for command in commands if idle in command]


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was_and_leaves_no_process(
    tree: dict[str, Any], undisturbed: Config, tmp_path: Path
):
    # Evaluations change no weight, and make steps last longer than a signal takes.
    slowly = {"sources": tree["corpus"]["sources"], "every_steps": 1, "max_bytes": 20_000}
    config = named(tree, "stopped", evaluation=slowly)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from fusellm_ray.cli import main; main()", "train", str(path)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}

    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert stopped.stderr is not None
    seen = []
    for line in stopped.stderr:
        seen.append(line)
        if "step 1/6" in line:
            children = psutil.Process(stopped.pid).children(recursive=True)
            heard_at = listening([psutil.Process(stopped.pid), *children])
            stopped.send_signal(signal.SIGTERM)
            break
    rest = stopped.stderr.read()
    assert stopped.wait(timeout=120) == 130, "".join(seen) + rest
    assert children
    assert heard_at <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    deadline = time.monotonic() + 20
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [child for child in children if child.is_running() and child.status() != "zombie"] == []
    (at,) = Checkpoints(config.run.storage, "stopped").steps()[-1:]
    assert 1 <= at < 6

    resumed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(records_of(config)) == losses(records_of(undisturbed))
    assert same_bits(weights(config, tmp_path / "stopped"), weights(undisturbed, tmp_path / "undisturbed"))
