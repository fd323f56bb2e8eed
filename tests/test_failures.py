"""Errors of a worker group of 64 ranks, as a person reads them."""

from __future__ import annotations

from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from fusellm_ray.config_file import parse_config
from fusellm_ray.errors import ClusterError, ModelError
from fusellm_ray.job import explain_failure
from fusellm_ray.observe.failures import group_failures, ranges

CONFIG = parse_config(
    {
        "run": {"name": "a"},
        "target": {"model": "m"},
        "fusion": {"rule": "none"},
        "corpus": {"sources": [{"name": "s", "path": "p"}]},
        "training": {"steps": 1, "batch_rows": 64},
        "trainer": {"workers": 64, "max_failures": 2},
    }
)


def lost(rank: int) -> Exception:
    return RuntimeError(
        f"[192.0.2.{rank}]:{40000 + rank}: Connection closed by peer (pid={100 + rank}, 0x7f{rank:02x})"
    )


def test_sixty_four_ranks_that_lose_one_another_are_two_lines_and_the_cause_is_first():
    failures: dict[int, Exception] = {rank: lost(rank) for rank in range(64)}
    failures[17] = MemoryError("CUDA out of memory: tried to allocate 12 GiB")
    explained = explain_failure(WorkerGroupError("x" * 100_000, failures), CONFIG)
    assert type(explained) is ClusterError
    first, second, third = str(explained).splitlines()
    assert "trainer.max_failures=2" in first
    assert second == "rank 17: MemoryError: CUDA out of memory: tried to allocate 12 GiB"
    assert third.startswith("ranks 0–16, 18–63: RuntimeError: [192.0.2.0]:40000: Connection closed")


def test_an_error_of_ours_on_one_rank_is_the_runs_error():
    failures: dict[int, Exception] = {rank: lost(rank) for rank in range(64)}
    failures[5] = ModelError("loss is not finite")
    assert str(explain_failure(WorkerGroupError("", failures), CONFIG)) == "loss is not finite"
    assert isinstance(explain_failure(ControllerError(ModelError("no")), CONFIG), ModelError)


def test_errors_of_different_kinds_stay_apart_and_long_ones_are_cut():
    text = group_failures(
        {0: ValueError("a" * 5000), 1: TypeError("a"), 2: ValueError("b"), 3: ValueError("b")}
    )
    lines = text.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["rank 0", "rank 1", "ranks 2–3"]
    assert len(lines[0]) < 2000


def test_ranges_join_neighbours():
    assert ranges([5, 0, 1, 2, 9, 8]) == "0–2, 5, 8–9"
