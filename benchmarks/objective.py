"""The objective against CLM: time of forward + backward, and memory above weights and weight gradients.

    python -m benchmarks.objective            # the last line is one JSON object

Three ways through the same head and positions: `fused` (two teachers fused, then the objective), `clm` (the
same fused head, no teachers) and `dense` (all logits, then cross_entropy). Times are medians of interleaved
repeats in one process: on a GPU by events; on a CPU wall clock, but for one thread the process's CPU time,
which is what the wall clock shows on an idle machine and leaves other processes out. Memory is measured once
a way: on a CPU in a process of its own, as the growth of its peak resident set during the step (the
kernel's high-water mark, reset before), less the head's gradient; on a GPU by the allocator's peak.

As in the trainer, a GPU gets its teachers fused: a thread of the host fuses and copies the next batch during
the step. So there a repeat is a row of steps, which takes as long as the slower of the two. On a CPU, fusing
is part of the step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fusellm_ray.config import FusionConfig, ObjectiveConfig
from fusellm_ray.fusion.fuse import Candidates, Fused, fuse
from fusellm_ray.fusion.loss import objective
from fusellm_ray.target.batches import after_copy, begin_copy

WAYS = ("fused", "clm", "dense")
SEGMENT_TOKENS = 256
STEPS_ON_GPU = 10
"""In a row, for each timing."""
SETTINGS = ("dtype", "threads", "repeats", "vocab_size", "hidden_size", "positions", "top_k", "chunk_tokens")


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(measure_memory(args, args.memory_of)))
        return
    memory = {way: memory_of(args, way) for way in WAYS}
    clocks = measure_times(args)
    clock = "cuda events" if args.device == "cuda" else "cpu" if args.threads == 1 else "wall"
    seconds = {way: statistics.median(times) for way, times in clocks[clock].items()}
    for way in WAYS:
        low, high = min(clocks[clock][way]), max(clocks[clock][way])
        print(f"{way:6} {seconds[way]:8.3f} s ({low:.3f} to {high:.3f}), {memory[way] / 2**20:.1f} MiB")
    report = {
        "time_over_fused_clm": round(seconds["fused"] / seconds["clm"], 4),
        "time_over_dense_clm": round(seconds["fused"] / seconds["dense"], 4),
        "peak_memory_over_dense_clm": round(memory["fused"] / memory["dense"], 4),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "clock": clock,
        **{key: getattr(args, key) for key in (*SETTINGS, "rule", "divergence", "tail")},
        "seconds": {
            name: {way: round(statistics.median(times), 4) for way, times in ways.items()}
            for name, ways in clocks.items()
        },
        "memory_mib": {way: round(memory[way] / 2**20, 1) for way in WAYS},
    }
    print(json.dumps(report))


def parse_args() -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    fusion, loss = FusionConfig(), ObjectiveConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab-size", type=int, default=152_000)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=loss.chunk_tokens)
    parser.add_argument("--rule", default=fusion.rule, choices=["min_ce", "avg_ce", "mean"])
    parser.add_argument("--divergence", default=loss.divergence)
    parser.add_argument("--tail", default=loss.tail)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", default="bfloat16" if has_gpu else "float32", choices=["float32", "bfloat16"]
    )
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


class Step:
    """Forward and backward of one batch: hidden states and head are leaves, as a trainer's are."""

    def __init__(self, args: argparse.Namespace) -> None:
        rng = torch.Generator().manual_seed(0)
        N, V, d = args.positions, args.vocab_size, args.hidden_size
        dtype = getattr(torch, args.dtype)
        self.weight = torch.randn(V, d, generator=rng).mul_(d**-0.5).to(args.device, dtype).requires_grad_()
        self.hidden = torch.randn(N, d, generator=rng).mul_(3).to(args.device, dtype).requires_grad_()
        gold = torch.randint(V, (N,), generator=rng)
        self.gold = gold.to(args.device)
        segment = torch.arange(N) // SEGMENT_TOKENS
        self.fuse = partial(
            fuse,
            [random_teacher(gold, V, args.top_k, rng) for _ in range(2)],
            config=FusionConfig(rule=args.rule),
            segment=segment,
            row=torch.zeros_like(segment),
            gold_bytes=torch.randint(1, 9, (N,), generator=rng),
        )
        self.objective = ObjectiveConfig(
            divergence=args.divergence, tail=args.tail, chunk_tokens=args.chunk_tokens
        )

        self.ahead = Ahead(self.fuse) if args.device == "cuda" else None

    def fused(self) -> None:
        self._head(self.fuse() if self.ahead is None else self.ahead.take())

    def clm(self) -> None:
        self._head(None)

    def dense(self) -> None:
        F.cross_entropy(self.hidden @ self.weight.t(), self.gold).backward()

    def _head(self, fused: Candidates | None) -> None:
        count = float(len(self.gold))
        objective(
            self.hidden, self.weight, None, self.gold, fused, config=self.objective, denominator=count
        ).loss.backward()

    def run(self, way: str) -> None:
        self.hidden.grad = self.weight.grad = None
        getattr(self, way)()

    @property
    def gradient_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


class Ahead:
    """The next fused batch, made and copied to the GPU by a thread while the one before is used."""

    def __init__(self, make: Callable[[], Fused]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1)
        self._copies = torch.cuda.Stream()
        self._next = self._thread.submit(self._prepare)

    def take(self) -> Fused:
        batch, copied = self._next.result()
        self._next = self._thread.submit(self._prepare)
        return after_copy(batch, copied, self._copies.device)

    def wait(self) -> None:
        """Until the next batch is made."""
        self._next.result()

    def _prepare(self) -> tuple[Fused, torch.cuda.Event]:
        return begin_copy(self._make(), self._copies)


def random_teacher(gold: Tensor, vocab_size: int, top_k: int, rng: torch.Generator) -> Candidates:
    """Distinct candidates, never gold, with peaked masses; one position in twenty has none."""
    N = len(gold)
    stride = vocab_size // (top_k + 1)
    shift = torch.randint(stride - 1, (N, 1), generator=rng)
    ids = gold[:, None] + 1 + shift + torch.arange(top_k) * stride
    masses = torch.rand(N, top_k + 2, generator=rng).pow(4).add(1e-6)
    logs = (masses / masses.sum(1, keepdim=True)).log()
    logprobs = logs[:, :top_k].sort(dim=1, descending=True).values
    valid = torch.rand(N, generator=rng) > 0.05
    return Candidates(ids % vocab_size, logprobs, logs[:, top_k], logs[:, top_k + 1], valid)


# ---------------------------------------------------------------------------------------- time


def measure_times(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds by clock and way."""
    step = Step(args)
    names = ("cuda events",) if args.device == "cuda" else ("wall", "cpu")
    clocks: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in names}
    warm_up(args)
    for repeat in range(args.repeats):
        # The order turns, so that no way always follows the same other.
        turn = repeat % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            for name, elapsed in timed(step, way, args.device).items():
                clocks[name][way].append(elapsed)
    return clocks


def timed(step: Step, way: str, device: str) -> dict[str, float]:
    if device == "cpu":
        wall, cpu = time.perf_counter(), time.process_time()
        step.run(way)
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    assert step.ahead is not None
    step.ahead.wait()
    begin.record()
    for _ in range(STEPS_ON_GPU):
        step.run(way)
    step.ahead.wait()  # as many were fused as used
    end.record()
    torch.cuda.synchronize()
    return {"cuda events": begin.elapsed_time(end) / 1e3 / STEPS_ON_GPU}


def warm_up(args: argparse.Namespace) -> None:
    """All code paths once; on a GPU at full size, where kernels are chosen by shape."""
    small = argparse.Namespace(**vars(args))
    if args.device == "cpu":
        small.positions, small.vocab_size, small.chunk_tokens = 64, 8 * args.top_k + 64, 32
    step = Step(small)
    for way in WAYS:
        step.run(way)


# -------------------------------------------------------------------------------------- memory


def memory_of(args: argparse.Namespace, way: str) -> int:
    if args.device == "cuda":
        return measure_memory(args, way)
    command = [sys.executable, "-m", "benchmarks.objective", *sys.argv[1:], "--memory-of", way]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure_memory(args: argparse.Namespace, way: str) -> int:
    """Bytes a step needs at its peak, above its inputs and the gradient of the head."""
    warm_up(args)
    step = Step(args)
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run(way)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - step.gradient_bytes
    before = reset_peak()
    step.run(way)
    return peak_bytes() - before - step.gradient_bytes


def reset_peak() -> int:
    """Set the process's peak resident set to its present one (Linux), and give it."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The kernel's high-water mark; getrusage's would also remember what reset_peak forgot."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
