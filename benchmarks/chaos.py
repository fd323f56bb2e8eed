"""What random kills do to a run: `python -m benchmarks.chaos --kills 50`.

The same small run twice, on a private Ray each: once left alone, once with processes killed (SIGKILL) as its steps
go by: replicas, the supervisor (all replicas go with it), and one time in ten a trainer rank. Teachers are simulated,
two with two replicas each, and slow enough that requests are out at any time. `lost` and `duplicated` are tokens, step
by step against the run left alone; a step that a restarted rank repeats from its checkpoint replaces the one before.
That they are the same tokens shows in `losses_equal` and in `cursors_equal`: how far each shard of the corpus was read.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from fusellm_ray.config import Config
from fusellm_ray.config_file import parse_config
from fusellm_ray.job import run_job
from fusellm_ray.observe.progress import Display
from fusellm_ray.target.storage import Checkpoints
from tests.faults import Descendants, own_processes, same_bits, weights
from tests.runs import build_run
from tests.tokenizers import build

STEPS_PER_KILL = 3
RANK_SHARE = 0.1
"""Of the kills: a rank takes its whole worker group with it."""
TOKENS_PER_S = 2500
"""Of a replica; a step asks each teacher for 256 tokens."""


class Chaos(Display):
    """A display that kills a process of this run whenever some steps have gone by."""

    def __init__(self, kills: int, seed: int) -> None:
        self._left = kills
        self._next = STEPS_PER_KILL
        self._random = random.Random(seed)
        self.killed: collections.Counter[str] = collections.Counter()
        self.steps: dict[int, dict[str, Any]] = {}
        self._times: list[float] = []
        self.processes = Descendants()

    def note(self, text: str) -> None:
        print(text, flush=True)

    def show(self, record: dict[str, Any]) -> None:
        if record["event"] != "step":
            return
        self._times.append(time.monotonic())
        self.processes.look()
        self.steps[record["step"]] = record
        if self._left and record["step"] >= self._next and self._kill():
            self._next = record["step"] + STEPS_PER_KILL
            self._left -= 1

    def _kill(self) -> bool:
        is_rank = self._random.random() < RANK_SHARE
        titles = ["ray::RayTrainWorker"] if is_rank else ["ray::TeacherReplica", "ray::PoolSupervisor"]
        found = [(pid, title) for title in titles for pid in own_processes(title)]
        if not found:
            return False
        pid, title = self._random.choice(found)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
            self.killed[title.removeprefix("ray::")] += 1
            return True
        return False

    @property
    def seconds(self) -> float:
        """From the first step to the last."""
        return self._times[-1] - self._times[0]


def make_config(folder: Path, name: str, tree: dict[str, Any]) -> Config:
    return parse_config(tree | {"run": {"name": name, "storage": str(folder / "storage")}})


def make_tree(folder: Path, kills: int) -> dict[str, Any]:
    tokenizers = {kind: build(kind, folder / kind) for kind in ("bytelevel", "unigram", "llama")}
    tree = build_run(
        folder / "models",
        tokenizers,
        training={"steps": STEPS_PER_KILL * (kills + 10)},
        trainer={"workers": 2, "resources_per_worker": {"CPU": 0.1}, "max_failures": kills + 1},
        stream={"in_flight_tokens": 256, "deadline_s": 600},
        checkpoint={"every_steps": 10},
    )
    for teacher in tree["teachers"]:
        teacher |= {
            "engine": {"type": "simulated", "tokens_per_s": TOKENS_PER_S},
            "replicas": {"min": 2, "max": 2},
            "cache_bytes": 0,
        }
    return tree


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tree = make_tree(root, arguments.kills)
        calm, chaos = Chaos(0, arguments.seed), Chaos(arguments.kills, arguments.seed)
        runs = {"calm": calm, "chaos": chaos}
        exported, cursors = {}, []
        for name, display in runs.items():
            config = make_config(root, name, tree)
            outcome = run_job(config, display=display)
            assert outcome.is_finished
            exported[name] = weights(config, root / f"{name}-export")
            state = Checkpoints(config.run.storage, config.run.name).latest_state()
            assert state is not None
            cursors.append(state["cursors"])
    kills = chaos.killed.total()
    tokens = [(calm.steps[step]["tokens"], chaos.steps.get(step, {}).get("tokens", 0)) for step in calm.steps]
    figures = {
        "kills": kills,
        "killed": dict(chaos.killed),
        "lost": int(sum(max(0, wanted - seen) for wanted, seen in tokens)),
        "duplicated": int(sum(max(0, seen - wanted) for wanted, seen in tokens)),
        "losses_equal": all(calm.steps[s]["loss"] == chaos.steps.get(s, {}).get("loss") for s in calm.steps),
        "cursors_equal": cursors[0] == cursors[1],
        "weights_equal": same_bits(*exported.values()),
        "seconds_lost_per_kill": round((chaos.seconds - calm.seconds) / max(1, kills), 2),
        "seconds": {name: round(display.seconds, 1) for name, display in runs.items()},
        "steps": len(calm.steps),
        "processes_left": chaos.processes.left(),
        "cores": len(os.sched_getaffinity(0)),
    }
    for key, figure in figures.items():
        print(f"{key:24} {figure}")
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
