"""How fast and how faithful the alignment is: `python -m benchmarks.alignment`.

One core, k = 16, real tokenizers, the standard library as text. Speeds are CPU time of `Aligner.align` with all
tables warm; the teachers' top-k are made up, but realistic: the realised token is among them two times in three,
and half of the others begin as it does. Fidelity and coverage are those of real models, where there are any.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusellm_ray.alignment import Aligner
from fusellm_ray.alignment.edit_distance import Strings, nearest
from fusellm_ray.alignment.statistics import AlignmentStatistics, Sequences, alignment_statistics
from fusellm_ray.alignment.vocabulary import VocabularyMap, text_tokens
from fusellm_ray.config import AlignmentConfig
from fusellm_ray.corpus.tokens import ByteTokenizer

TOP_K = 16
PAIRS = [("llama2", "gpt-neox"), ("smollm2", "qwen3"), ("gpt-neox", "llama2"), ("qwen3", "smollm2")]
"""Target, teacher."""


@dataclass(frozen=True)
class Sample:
    """The arguments of one call of `Aligner.align`."""

    text: bytes
    arrays: tuple[np.ndarray, ...]
    num_positions: int


def english() -> str:
    return "\n\n".join(pydoc_data.topics.topics.values())


def code() -> str:
    library = Path(os.__file__).parent
    return "\n".join((library / name).read_text() for name in ("argparse.py", "typing.py", "inspect.py"))


def documents(target: ByteTokenizer, num_tokens: int, count: int) -> list[str]:
    """Half English, half code, each of about `num_tokens` target tokens."""
    cut = []
    for text in (english(), code()):
        ends = target.encode(text[:400_000]).ends
        data = text.encode()
        for i in range(count // 2):
            first, last = ends[i * num_tokens], ends[(i + 1) * num_tokens - 2]
            cut.append(data[first:last].decode(errors="ignore"))
    return cut


class MadeUpTeacher:
    """Top-k rows for a text, from the teacher's vocabulary alone."""

    def __init__(self, tokenizer: ByteTokenizer, texts: list[str], seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        tokens = text_tokens(tokenizer)
        self._sorted = np.array(
            sorted((i for i, t in enumerate(tokens) if t), key=tokens.__getitem__), np.int32
        )
        self._place = np.zeros(len(tokens), np.int64)
        self._place[self._sorted] = np.arange(len(self._sorted))
        self._used = np.concatenate([tokenizer.encode(text).ids for text in texts])

    def rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """top_ids, top_logprobs [M-1, k] and gold_logprobs [M-1]."""
        rng, m = self._rng, len(ids) - 1
        realised = ids[1:]
        near = self._place[realised][:, None] + rng.integers(-12, 13, (m, TOP_K))
        near = self._sorted[np.clip(near, 0, len(self._sorted) - 1)]
        common = self._used[rng.integers(0, len(self._used), (m, TOP_K))]
        top = np.where(rng.random((m, TOP_K)) < 0.5, near, common).astype(np.int32)
        rank = np.minimum(rng.geometric(0.35, m) - 1, TOP_K - 1)
        has_realised = rng.random(m) < 0.66
        top[np.flatnonzero(has_realised), rank[has_realised]] = realised[has_realised]
        # A top-k holds each token once: later copies are unused slots.
        order = np.argsort(top, axis=1, kind="stable")
        ranked = np.take_along_axis(top, order, 1)
        again = np.zeros((m, TOP_K), bool)
        np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
        logits = -np.sort(rng.exponential(2.0, (m, TOP_K)).cumsum(1), axis=1)
        mass = np.exp(logits - logits[:, :1])
        mass *= (rng.uniform(0.75, 0.98, m) / mass.sum(1))[:, None]
        logprobs = np.where(again, -np.inf, np.log(mass)).astype(np.float32)
        is_realised = (top == realised[:, None]) & ~again
        gold = np.where(is_realised.any(1), logprobs[np.arange(m), is_realised.argmax(1)], -7.0)
        return top, logprobs, gold.astype(np.float32)


def samples(target: ByteTokenizer, teacher: ByteTokenizer, num_tokens: int, count: int) -> list[Sample]:
    texts = documents(target, num_tokens, count)
    made_up = MadeUpTeacher(teacher, texts)
    made = []
    for text in texts:
        ours, theirs = target.sequence(text, True), teacher.sequence(text, True)
        arrays = (ours.ids, ours.ends, theirs.ids, theirs.ends, *made_up.rows(theirs.ids))
        made.append(Sample(text.encode(), arrays, len(ours.ids) - 1))
    return made


def positions_per_cpu_s(aligner: Aligner, made: list[Sample], repeats: int) -> float:
    """Median over repeats, tables and compiled code warm."""
    for sample in made:
        aligner.align(sample.text, *sample.arrays)
    speeds = []
    for _ in range(repeats):
        start = time.process_time()
        for sample in made:
            aligner.align(sample.text, *sample.arrays)
        speeds.append(sum(s.num_positions for s in made) / (time.process_time() - start))
    return statistics.median(speeds)


def map_seconds(teacher: ByteTokenizer, target: ByteTokenizer, projection: str) -> float:
    """A cold vocabulary map. Compilation, cached on disk, is not counted."""
    nearest(Strings.of(["a", "b"]), 1)
    start = time.process_time()
    VocabularyMap(teacher, target, projection)  # type: ignore[arg-type]
    return time.process_time() - start


def score(folder: Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A real model's rows, float32, one thread."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].float().log_softmax(-1)
    top = logprobs.topk(TOP_K)
    gold = logprobs.gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0]
    return top.indices.int().numpy(), top.values.numpy(), gold.numpy()


def faithfulness(target: ByteTokenizer, folder: Path, text: str, vocab_size: int) -> AlignmentStatistics:
    teacher = ByteTokenizer.load(str(folder), vocab_size=vocab_size)
    ours, theirs = target.sequence(text, True), teacher.sequence(text, True)
    sequences = Sequences(text.encode(), ours.ids, ours.ends, theirs.ids, theirs.ends)
    aligner = Aligner(teacher, target, AlignmentConfig(), TOP_K)
    rows = score(folder, theirs.ids)
    aligned = aligner.align(text.encode(), ours.ids, ours.ends, theirs.ids, theirs.ends, *rows)
    return alignment_statistics(aligner, [sequences], [aligned])


def real_models(folder: Path, num_bytes: int) -> dict[str, dict[str, float]]:
    """SmolLM2 from each model at hand, on English and on code."""
    folders = sorted(p.parent for p in folder.glob("*/model.safetensors"))
    if not (folder / "smollm2").is_dir() or len(folders) < 2:
        print(f"fidelity and coverage: skipped, {folder} has no smollm2 beside another model")
        return {}
    target = ByteTokenizer.load(str(folder / "smollm2"))
    found = {}
    for teacher in folders:
        vocab_size = json.loads((teacher / "config.json").read_text())["vocab_size"]
        for name, text in (("english", english()), ("code", code())):
            passage = text.encode()[50_000 : 50_000 + num_bytes].decode(errors="ignore")
            figures = faithfulness(target, teacher, passage, vocab_size)
            found[f"smollm2 <- {teacher.name}, {name}"] = {
                "fidelity": figures.fidelity,
                "coverage": figures.coverage,
                "straddled": figures.shares["straddled"],
                "residual_mass": figures.residual_mass,
            }
            print(
                f"smollm2 <- {teacher.name}, {name}: {found[f'smollm2 <- {teacher.name}, {name}']}",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get(
        "FUSELLM_TOKENIZERS", str(Path(__file__).parents[2] / "shared/assets/tokenizers")
    )
    parser.add_argument("--tokenizers", type=Path, default=Path(default))
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache" / "fusellm-assets")
    parser.add_argument(
        "--bytes", type=int, default=4000, help="of English and of code that real models score"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not args.tokenizers.is_dir():
        raise SystemExit(
            f"{args.tokenizers}: no such folder; give --tokenizers a folder with gpt-neox, llama2, …"
        )
    names = sorted({name for pair in PAIRS for name in pair})
    tokenizers = {name: ByteTokenizer.load(str(args.tokenizers / name)) for name in names}

    result: dict[str, object] = {"top_k": TOP_K}
    span: dict[str, float] = {}
    for target, teacher in PAIRS:
        pair = f"{target} <- {teacher}"
        t, s = tokenizers[target], tokenizers[teacher]
        aligner = Aligner(s, t, AlignmentConfig(), TOP_K)
        span[pair] = positions_per_cpu_s(aligner, samples(t, s, 1000, 40), args.repeats)
        print(f"span + prefix, {pair}: {span[pair]:,.0f} positions per CPU second", flush=True)
    neox, llama = tokenizers["gpt-neox"], tokenizers["llama2"]
    prefix_s = map_seconds(neox, llama, "prefix")
    print(f"prefix map gpt-neox -> llama2: {prefix_s:.2f} s", flush=True)
    mined_s = map_seconds(neox, llama, "mined")
    print(f"mined map gpt-neox -> llama2: {mined_s:.2f} s", flush=True)
    paper = AlignmentConfig(sequence="dtw", straddle="onehot", projection="mined")
    aligner = Aligner(neox, llama, paper, TOP_K)
    dtw = positions_per_cpu_s(aligner, samples(llama, neox, 2000, 10), args.repeats)
    print(f"dtw + mined, llama2 <- gpt-neox: {dtw:,.0f} positions per CPU second", flush=True)
    result |= {
        "span_positions_per_cpu_s": min(span.values()),
        "span_pairs": span,
        "dtw_positions_per_cpu_s": dtw,
        "prefix_map_s": prefix_s,
        "mined_map_s": mined_s,
    }
    models = real_models(args.models, args.bytes)
    if models:
        result["fidelity"] = {pair: figures["fidelity"] for pair, figures in models.items()}
        result["coverage"] = {pair: figures["coverage"] for pair, figures in models.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
