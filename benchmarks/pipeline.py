"""What the machinery costs: the quickstart's fused run on warm models, CPU seconds by what they were spent on.

    python -m benchmarks.pipeline [--steps 60] [--cache ~/.cache/fusellm_ray/quickstart]

`overhead_share` is the share of all CPU seconds, of every process of the run (Ray's own included), that was spent
outside the models' forward and backward passes: reading, tokenising, aligning, framing, Ray, joining, fusing, the
optimiser, checkpoints. It counts from the end of step 2 to the end of the last step, so start-up is left out.
Thread CPU time measures the passes: one thread each, as the quickstart runs them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import psutil
import ray

from fusellm_ray.config import Config
from fusellm_ray.config_file import parse_config
from fusellm_ray.job import local_or_running_cluster, run_job
from fusellm_ray.observe.progress import Display
from fusellm_ray.quickstart.run import quickstart_config
from fusellm_ray.quickstart.zoo import DEFAULT_CACHE, build_zoo, point_latest
from fusellm_ray.teachers.service import start_pools, stop_pools, wait_ready

FIRST_STEP = 2


class Probe(Display):
    """A display that takes the CPU seconds of all processes when steps end."""

    def __init__(self, pools: dict[str, Any]) -> None:
        self._pools = pools
        self.samples: list[dict[str, float]] = []
        self.rank_compute_s = 0.0
        self.tokens = 0.0
        self.wait_shares: list[float] = []

    def note(self, text: str) -> None:
        print(text, flush=True)

    def show(self, record: dict[str, Any]) -> None:
        if record["event"] != "step":
            return
        if record["step"] > FIRST_STEP:
            self.rank_compute_s += record["time/compute_cpu_s"]
            self.tokens += record["tokens"]
            self.wait_shares.append(record["time/wait_share"])
        if record["step"] in (FIRST_STEP, record["steps"]):
            self.samples.append(self._sample())

    def _sample(self) -> dict[str, float]:
        stats = [s for name, pool in self._pools.items() for s in ray.get(pool.stats.remote(name)).values()]
        return {
            "all": _cpu_seconds(),
            "teachers": sum(s.model_cpu_s for s in stats),
            "align": sum(s.align_s for s in stats),
        }


def _cpu_seconds() -> float:
    """User and system time of this process and everything under it."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def require_steps(parser: argparse.ArgumentParser, option: str, steps: int) -> None:
    """End the program where nothing would be left to count."""
    if steps <= FIRST_STEP:
        parser.error(f"{option} {steps}: counting begins at the end of step {FIRST_STEP}; give more")


def measure(config: Config) -> dict[str, float]:
    with local_or_running_cluster(config):
        pools = start_pools(config)
        try:
            wait_ready(pools, config.run.start_timeout_s)
            probe = Probe(pools)
            run_job(config, display=probe, pools=pools)
        finally:
            stop_pools(pools)
    first, last = probe.samples
    spent = {name: last[name] - first[name] for name in first}
    compute = probe.rank_compute_s + spent["teachers"]
    return {
        "overhead_share": 1 - compute / spent["all"],
        "tokens_per_cpu_s": probe.tokens / spent["all"],
        "cpu_s": spent["all"],
        "forward_backward_cpu_s": compute,
        "of_ranks_s": probe.rank_compute_s,
        "of_teachers_s": spent["teachers"],
        "align_s": spent["align"],
        "tokens": probe.tokens,
        "median_wait_share": sorted(probe.wait_shares)[len(probe.wait_shares) // 2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    require_steps(parser, "--steps", arguments.steps)
    cache = arguments.cache.expanduser()
    point_latest(build_zoo(cache, on_progress=lambda stage, share, message: None).folder)
    tree = quickstart_config(cache, seed=arguments.seed, steps=arguments.steps).model_dump(mode="json")
    tree["evaluation"]["sources"] = []
    with tempfile.TemporaryDirectory() as storage:
        tree["run"] |= {"name": "pipeline", "storage": storage}
        figures = measure(parse_config(tree))
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
