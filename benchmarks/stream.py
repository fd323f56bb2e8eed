"""How fast the stream is where teachers cost nothing: `python -m benchmarks.stream`.

Two simulated teachers, k = 16, one replica each; a rank reads text, streams it to both, and fuses. Everything
is as in a run (corpus, rows, alignment, frames, Ray, join, fusion) but the engines and the training step.
Tokens are the target's. Tokenizers come from --tokenizers where that folder exists, else small ones are
trained. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import pydoc_data.topics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
import transformers

from fusellm_ray.config import Config
from fusellm_ray.config_file import parse_config
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.job import start_private_ray, stop_private_ray
from fusellm_ray.stream.client import TeacherAddress, TeacherStream
from fusellm_ray.stream.memory import DiskWatch
from fusellm_ray.target.batches import RankBatches
from fusellm_ray.teachers.service import start_pools, stop_pools, wait_ready

TOKENIZERS = Path(__file__).parents[2] / "shared" / "assets" / "tokenizers"
TARGET, TEACHERS = "smollm2", ("qwen3", "llama2")


def write_models(tokenizers: Path, root: Path) -> dict[str, Path]:
    """A folder with a tokenizer for each teacher, and with a one-layer model besides for the target."""
    names = (TARGET, *TEACHERS)
    if all((tokenizers / name / "tokenizer.json").exists() for name in names):
        made = {name: tokenizers / name for name in names}
    else:
        from tests.tokenizers import build

        made = {
            name: build(kind, root / kind)
            for name, kind in zip(names, ("bytelevel", "llama", "unigram"), strict=True)
        }
    tokenizer = ByteTokenizer.load(str(made[TARGET]))
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4096,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(root / "target")
    tokenizer.hf.save_pretrained(root / "target")
    return {**made, TARGET: root / "target"}


def write_corpus(folder: Path) -> None:
    """About 8 MB of English and Python, one JSONL file each."""
    folder.mkdir()
    library = Path(os.__file__).parent
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-h]*/*.py"))
    texts = {
        "prose": [text for _, text in sorted(pydoc_data.topics.topics.items())],
        "code": [path.read_text(errors="ignore") for path in files],
    }
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": d}) + "\n" for d in documents if d.strip())
        )


def make_config(models: dict[str, Path], corpus: Path, rows: int) -> Config:
    return parse_config(
        {
            "run": {"name": "stream-benchmark"},
            "target": {"model": str(models[TARGET])},
            "teachers": [
                {
                    "name": name,
                    "model": str(models[name]),
                    "engine": {"type": "simulated"},
                    "top_k": 16,
                    "cache_bytes": 4 << 20,  # full before the measurement begins, so that growth is a leak
                }
                for name in TEACHERS
            ],
            "corpus": {
                "sources": [{"name": n, "path": str(corpus / f"{n}.jsonl")} for n in ("prose", "code")],
                "row_tokens": 2048,
            },
            "training": {"steps": 1, "batch_rows": rows, "micro_rows": rows},
        }
    )


@contextlib.contextmanager
def teachers_up(config: Config) -> Iterator[dict[str, TeacherAddress]]:
    pools = start_pools(config)
    try:
        descriptions = wait_ready(pools, 600)
        yield {
            t.name: TeacherAddress(t.name, descriptions[t.name].fingerprint, t.top_k, pools[t.name])
            for t in config.active_teachers
        }
    finally:
        stop_pools(pools)


def own_memory_bytes(pid: int) -> int:
    """Resident memory of a process without what it shares with others (the object store)."""
    _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="measured, after a warm-up of a quarter"
    )
    parser.add_argument("--rows", type=int, default=8, help="of 2 048 tokens in a batch")
    parser.add_argument("--tokenizers", type=Path, default=TOKENIZERS)
    arguments = parser.parse_args(argv)
    os.environ["RAYON_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    start_private_ray(num_cpus=4, object_store_memory=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(arguments.tokenizers, Path(folder))
        write_corpus(Path(folder) / "corpus")
        config = make_config(models, Path(folder) / "corpus", arguments.rows)
        with teachers_up(config) as addresses:
            figures = measure(config, addresses, arguments.tokens)
    stop_private_ray()
    for key, figure in figures.items():
        print(f"{key:32} {figure}")
    print(json.dumps(figures))
    return figures


def measure(config: Config, addresses: dict[str, TeacherAddress], num_tokens: int) -> dict[str, Any]:
    tokenizer = ByteTokenizer.load(config.target.model)
    corpus = Corpus.open(config.corpus, 0)
    rows = config.training.batch_rows
    disk = DiskWatch()
    readers = {i: ShardReader(corpus, tokenizer, i, rows, config.corpus.row_tokens) for i in range(rows)}
    stream = TeacherStream(list(addresses.values()), config.stream, tokenizer.vocab_size)
    batches = RankBatches(readers, stream, config, pad_id=0, num_micro=1, device=torch.device("cpu"))
    tables = ray.get([address.pool.table.remote(name) for name, address in addresses.items()])
    descriptions = ray.get([h.describe.remote() for table in tables for h in table.handles.values()])
    pids = {"rank": os.getpid(), **{d.name: d.pid for d in descriptions}}

    def take(tokens: int) -> int:
        taken = 0
        while taken < tokens:
            batch = next(batches)
            assert all(micro.fused is not None for micro in batch.micro_batches)
            taken += batch.num_gold
        return taken

    gc.freeze()  # as a rank does
    try:
        take(num_tokens // 4)
        before = {name: own_memory_bytes(pid) for name, pid in pids.items()}
        cpu_before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        sent_before = {name: (t.answer_bytes, t.positions) for name, t in stream.stats().items()}
        started = time.perf_counter()
        tokens = take(num_tokens)
        seconds = time.perf_counter() - started
        growth = {name: own_memory_bytes(pid) - before[name] for name, pid in pids.items()}
        cpu = {name: cpu_seconds(pid) - cpu_before[name] for name, pid in pids.items()}
        traffic = stream.stats()
    finally:
        batches.close()
    per_token = [
        (t.answer_bytes - sent_before[name][0]) / (t.positions - sent_before[name][1])
        for name, t in traffic.items()
    ]
    return {
        "tokens_per_s": round(tokens / seconds),
        "tokens": tokens,
        "bytes_per_token_per_teacher": round(max(per_token), 2),
        "disk_bytes": disk.count(),
        "memory_growth_mb": {name: round(size / 1e6, 1) for name, size in growth.items()},
        "cpu_us_per_token": {name: round(s / tokens * 1e6, 2) for name, s in cpu.items()},
        "wait_s": round(stream.wait_s, 2),
        "retries": sum(t.retries for t in traffic.values()),
        "cores": len(os.sched_getaffinity(0)),
        "vocab_size": tokenizer.vocab_size,
    }


if __name__ == "__main__":
    main()
