"""Does the stream keep many replicas busy? `python -m benchmarks.scaling`.

Simulated replicas of 40 000 tokens a second each, in slow motion: what a replica's accelerator does takes `--dilation`
times as long, and sixteen replicas share an actor's process, so that two cores carry many. What is measured is the
protocol: choice of replica, credits, read-ahead, fan-out. What the CPUs of replicas and ranks do costs relatively less
than at full speed; `python -m benchmarks.stream` measures that. All rates are given at full speed.

    efficiency     tokens a second of n replicas over n times those of one, with a rank that takes all it can get
    wait_share     of a rank's time, when it trains at a pace and the teacher could do 1.2 times that
    fan_out        step time with three teachers over step time with one, each with as many replicas

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from benchmarks.stream import TARGET, TEACHERS, TOKENIZERS, write_corpus, write_models
from fusellm_ray.config import Config, StreamConfig
from fusellm_ray.config_file import parse_config
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.job import start_private_ray, stop_private_ray
from fusellm_ray.stream.address import HandleTable, TeacherAddress
from fusellm_ray.stream.client import TeacherStream
from fusellm_ray.target.batches import RankBatches
from fusellm_ray.teachers.scoring import TeacherScorer
from fusellm_ray.teachers.turns import Turns

TOKENS_PER_S = 40_000
ROW_TOKENS = 512
REPLICAS_PER_RACK = 16
REQUESTS_PER_REPLICA = 30
"""Measured, after a tenth of as many."""
CAPACITY = 1.2
"""Of the teacher over the rank's appetite, where the rank's waiting is measured."""


class Rack:
    """Actor with several replicas, each with a simulated accelerator of its own; tokenizers and threads are shared."""

    def __init__(self, config: Config, replicas: int) -> None:
        (teacher,) = config.teachers
        first = TeacherScorer(teacher, config.target, config.alignment)
        self._scorers = [first] + [self._another(first) for _ in range(replicas - 1)]

    @staticmethod
    def _another(first: TeacherScorer) -> TeacherScorer:
        scorer = copy.copy(first)
        scorer.engine = copy.copy(first.engine)
        scorer._turns = Turns(2 * scorer.engine.max_prompts)
        scorer._in_flight = {}
        return scorer

    async def ready(self) -> str:
        for scorer in self._scorers:
            await scorer.self_test()
        return self._scorers[0].fingerprint

    async def score(
        self, replica: int, request: NDArray[np.uint8], run: str, batch: int
    ) -> NDArray[np.uint8]:
        return await self._scorers[replica].answer(request, run, batch)


@dataclass(frozen=True)
class Replica:
    """What a rank holds in place of a replica's handle."""

    rack: Any
    number: int

    @property
    def score(self) -> Replica:
        return self

    def remote(self, request: Any, run: str, batch: int) -> Any:
        return self.rack.score.remote(self.number, request, run, batch)


class Table:
    """Actor in place of a supervisor: its replicas are always the same."""

    def __init__(self, replicas: list[Replica]) -> None:
        self._table = HandleTable(dict(enumerate(replicas)))

    async def table(self, teacher: str, waited_s: float = 0.0) -> HandleTable:
        return self._table

    async def report(self, teacher: str, replica: int, reason: str, is_wrong: bool = False) -> HandleTable:
        return self._table


def make_config(models: dict[str, Path], corpus: Path, dilation: float) -> Config:
    return parse_config(
        {
            "run": {"name": "scaling-benchmark"},
            "target": {"model": str(models[TARGET])},
            "teachers": [
                {
                    "name": "simulated",
                    "model": str(models[TEACHERS[0]]),
                    "engine": {"type": "simulated", "tokens_per_s": TOKENS_PER_S / dilation, "jitter": 0.1},
                    "cache_bytes": 0,
                }
            ],
            "corpus": {
                "sources": [{"name": n, "path": str(corpus / f"{n}.jsonl")} for n in ("prose", "code")],
                "row_tokens": ROW_TOKENS,
            },
            "training": {"steps": 1, "batch_rows": 1, "micro_rows": 1},
        }
    )


class Bench:
    """Simulated replicas, and a rank that asks some of them."""

    def __init__(self, config: Config, replicas: list[Replica], fingerprint: str) -> None:
        self._config, self._replicas, self._fingerprint = config, replicas, fingerprint
        self._tokenizer = ByteTokenizer.load(config.target.model)
        self._corpus = Corpus.open(config.corpus, 0)

    def addresses(self, *ranges: tuple[int, int]) -> list[TeacherAddress]:
        """A teacher each, of these replicas."""
        actor = ray.remote(Table).options(num_cpus=0)
        return [
            TeacherAddress("simulated", self._fingerprint, 16, actor.remote(self._replicas[start:stop]))
            for start, stop in ranges
        ]

    def run(self, teachers: list[TeacherAddress], replicas: int, step_s: float = 0.0) -> tuple[float, float]:
        """(target tokens a second, share of the time spent waiting) of a rank whose step takes `step_s`."""
        in_flight = max(StreamConfig().in_flight_tokens, 4 * replicas * ROW_TOKENS)
        stream = TeacherStream(teachers, StreamConfig(in_flight_tokens=in_flight), self._tokenizer.vocab_size)
        reader = ShardReader(self._corpus, self._tokenizer, 0, 1, ROW_TOKENS)
        config = self._config
        if len(teachers) > 1:
            config = config.model_copy(update={"teachers": config.teachers * len(teachers)})
        measured = REQUESTS_PER_REPLICA * replicas
        warm_up = max(2, measured // 10)
        batches = RankBatches(
            {0: reader},
            stream,
            config,
            pad_id=0,
            num_micro=1,
            device=torch.device("cpu"),
            num_batches=warm_up + measured,
        )
        try:
            for _ in self._steps(batches, warm_up, step_s):
                pass
            started, waited_s, tokens = time.perf_counter(), 0.0, 0
            for num_gold, wait_s in self._steps(batches, measured, step_s):
                waited_s += wait_s
                tokens += num_gold
            seconds = time.perf_counter() - started
        finally:
            batches.close()
        return tokens / seconds, waited_s / seconds

    def _steps(self, batches: RankBatches, count: int, step_s: float) -> Iterator[tuple[int, float]]:
        for _ in range(count):
            asked = time.perf_counter()
            batch = next(batches)
            yield batch.num_gold, time.perf_counter() - asked
            time.sleep(step_s)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dilation", type=float, default=32.0)
    parser.add_argument("--tokenizers", type=Path, default=TOKENIZERS)
    arguments = parser.parse_args(argv)
    os.environ["RAYON_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    most = max(arguments.replicas)
    start_private_ray(num_cpus=4, object_store_memory=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(arguments.tokenizers, Path(folder))
        write_corpus(Path(folder) / "corpus")
        config = make_config(models, Path(folder) / "corpus", arguments.dilation)
        sizes = [min(REPLICAS_PER_RACK, most - start) for start in range(0, most, REPLICAS_PER_RACK)]
        racks: list[Any] = [ray.remote(Rack).options(num_cpus=0).remote(config, size) for size in sizes]
        fingerprint = set(ray.get([rack.ready.remote() for rack in racks])).pop()
        replicas = [Replica(rack, i) for rack, size in zip(racks, sizes, strict=True) for i in range(size)]
        figures = measure(Bench(config, replicas, fingerprint), arguments.replicas, arguments.dilation)
    stop_private_ray()
    for key, figure in figures.items():
        print(f"{key:24} {figure}")
    print(json.dumps(figures))
    return figures


def measure(bench: Bench, replicas: list[int], dilation: float) -> dict[str, Any]:
    rates = {}
    for n in replicas:
        rates[n], _ = bench.run(bench.addresses((0, n)), n)
        print(f"{n} replicas: {rates[n] * dilation:,.0f} tokens/s", flush=True)
    one = rates[min(rates)] / min(rates)
    n = 16 if max(replicas) >= 48 else max(1, max(replicas) // 3)
    step_s = CAPACITY * ROW_TOKENS / (n * one)
    paced = {
        k: bench.run(bench.addresses(*((i * n, (i + 1) * n) for i in range(k))), n, step_s) for k in (1, 3)
    }
    return {
        "tokens_per_s": {n: round(rate * dilation) for n, rate in rates.items()},
        "efficiency": {n: round(rate / (n * one), 3) for n, rate in rates.items()},
        "efficiency_at_16": round(rates[16] / (16 * one), 3) if 16 in rates else None,
        "wait_share": round(paced[1][1], 4),
        "wait_share_three_teachers": round(paced[3][1], 4),
        "fan_out": round(paced[1][0] / paced[3][0], 3),
        "paced_replicas": n,
        "dilation": dilation,
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
