"""The quickstart's models: three experts and a target, built once from text on this machine, then cached.

    build_zoo ─ lock ─ text (here) ─┬─ process: tokenizer, model, training ─ python ─┬─ rename into place
                                    ├─ process                              prose  ─┤
                                    ├─ process                              cpp    ─┤
                                    └─ process                              target ─┘

Every model has its own kind of tokenizer and its own architecture. A build happens in a folder of its own
that is renamed when it is complete, so an interrupted one is never taken for a finished one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusellm_ray.errors import ModelError
from fusellm_ray.folders import try_lock
from fusellm_ray.quickstart import text
from fusellm_ray.quickstart.text import DOMAINS, PROSE_PACKAGES, Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusellm_ray.quickstart.tokenizer import TokenizerKind

DEFAULT_CACHE = Path("~/.cache/fusellm_ray/quickstart")

OnProgress = Callable[[str, float, str], None]
"""Called with what is being built ("text", a domain, "target"), the share that is done, and what goes on."""

Architecture = Literal["llama", "gpt_neox", "qwen3", "gpt2"]

_CODE = ("text.py", "tokenizer.py", "pretrain.py", "zoo.py")
_REPORT_EVERY_S = 0.3


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is made."""

    architecture: Architecture
    tokenizer: TokenizerKind
    vocab_size: int
    steps: int
    hidden_size: int = 128
    num_layers: int = 2
    head_size: int = 32
    batch_rows: int = 4
    row_tokens: int = 512
    """Also the longest context that it learns to read."""
    tokenizer_bytes: int = 1_000_000
    """Of text that the tokenizer is trained on."""


def _expert(architecture: Architecture, tokenizer: TokenizerKind, **options: Any) -> Recipe:
    return Recipe(
        architecture, tokenizer, vocab_size=4096, steps=200, hidden_size=144, head_size=48, **options
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a zoo's content depends on, but for the machine's text."""

    seed: int = 0
    sizes: Sizes = field(default_factory=Sizes)
    experts: Mapping[str, Recipe] = field(
        default_factory=lambda: {
            "python": _expert("llama", "byte_level"),
            "prose": _expert("gpt_neox", "sentencepiece"),
            "cpp": _expert("qwen3", "unigram", tokenizer_bytes=600_000),
        }
    )
    target: Recipe = Recipe(
        "gpt2", "digits", vocab_size=3072, steps=80, hidden_size=256, batch_rows=8, row_tokens=256
    )

    def version(self) -> str:
        """Changes with the recipes, the code that follows them, and the packages whose text is read."""
        return version_of(asdict(self), _CODE)


def version_of(plan: Mapping[str, Any], code: Sequence[str]) -> str:
    """A hash of a plan, the modules that follow it, and the packages whose text is read."""
    packages = ("torch", "tokenizers", "transformers", *PROSE_PACKAGES)
    content = {
        "plan": plan,
        "python": platform.python_version(),
        "packages": {name: _package_version(name) for name in packages},
        "code": {name: _sha256(Path(__file__).with_name(name)) for name in code},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Zoo:
    """Where everything lies. Models are Hugging Face folders; text is JSONL with the field `text`."""

    folder: Path
    target: Path
    experts: dict[str, Path]
    """By domain."""
    train: dict[str, Path]
    """By domain: no expert has seen it."""
    heldout: dict[str, Path]
    """By domain."""

    @classmethod
    def at(cls, folder: Path) -> Zoo:
        return cls(
            folder=folder,
            target=folder / "models" / "target",
            experts={domain: folder / "models" / domain for domain in DOMAINS},
            train={domain: folder / "text" / f"{domain}.train.jsonl" for domain in DOMAINS},
            heldout={domain: folder / "text" / f"{domain}.heldout.jsonl" for domain in DOMAINS},
        )


def build_zoo(
    cache_dir: str | Path = DEFAULT_CACHE, *, on_progress: OnProgress, plan: Plan | None = None
) -> Zoo:
    """The zoo of a plan: from the cache, or built now.

    Two builds of one plan at once: the second waits for the first. Ctrl-C leaves no process and no folder.

    Raises:
        CorpusError: this machine has too little text.
        ModelError: a model's process failed.
    """
    plan = plan or Plan()

    def build(folder: Path) -> None:
        _build(Zoo.at(folder), plan, on_progress)
        (folder / "plan.json").write_text(json.dumps(asdict(plan), indent=2))

    return Zoo.at(build_cached(Path(cache_dir), plan.version(), build, on_progress))


def build_cached(cache: Path, version: str, build: Callable[[Path], None], on_progress: OnProgress) -> Path:
    """The folder `version` of a cache, built now if it is not there; it appears whole or not at all."""
    cache = cache.expanduser()
    folder = cache / version
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock"), on_progress) as is_alone:
        if folder.is_dir():
            return folder
        if is_alone:
            for stale in cache.glob(f"{folder.name}.building-*"):
                shutil.rmtree(stale, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=cache))
        try:
            build(building)
            _rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def point_latest(folder: Path) -> None:
    """Give a folder of a cache the fixed name `latest`, for configuration files."""
    fresh = folder.parent / f".latest-{os.getpid()}"
    fresh.symlink_to(folder.name)
    fresh.replace(folder.parent / "latest")


def _build(zoo: Zoo, plan: Plan, on_progress: OnProgress) -> None:
    for path in (zoo.target, *zoo.experts.values(), *zoo.train.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
    sources: dict[str, Path] = {}
    for number, domain in enumerate(DOMAINS):
        on_progress("text", number / len(DOMAINS), f"finding {domain} text")
        split = text.find_domain(domain, plan.sizes, plan.seed)
        sources[domain] = zoo.folder / "text" / f"{domain}.expert.jsonl"
        text.write_jsonl(sources[domain], split.expert)
        text.write_jsonl(zoo.train[domain], split.train)
        text.write_jsonl(zoo.heldout[domain], split.heldout)
    on_progress("text", 1.0, "found")
    jobs = {d: Job(zoo.experts[d], plan.experts[d], (sources[d],), plan.seed) for d in DOMAINS}
    jobs["target"] = Job(zoo.target, plan.target, tuple(sources.values()), plan.seed)
    run_processes(jobs, on_progress)


# ---------------------------------------------------------------------------------- one model, in its process


@dataclass(frozen=True, slots=True)
class Job:
    """One model to build, in a process of its own."""

    folder: Path
    recipe: Recipe
    sources: tuple[Path, ...]
    """Read in equal parts."""
    seed: int
    start: Path | None = None
    """Continue this model, with its tokenizer, instead of beginning anew."""
    lr_scale: float = 1.0


def _build_model(job: Job, report: Callable[[float, str], None]) -> None:
    """Train a tokenizer and a model, and write both."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from fusellm_ray.models import use_cpu
    from fusellm_ray.quickstart.pretrain import pretrain, token_rows
    from fusellm_ray.quickstart.tokenizer import train_tokenizer

    recipe = job.recipe
    use_cpu(threads=1)
    torch.manual_seed(job.seed)
    transformers.logging.disable_progress_bar()
    documents = [[document.text for document in text.read_jsonl(path)] for path in job.sources]
    if job.start is None:
        report(0.0, "training the tokenizer")
        tokenizer = train_tokenizer(
            recipe.tokenizer, _take(documents, recipe.tokenizer_bytes), recipe.vocab_size, recipe.row_tokens
        )
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(job.start)
    report(0.02, "reading the text")
    num_tokens = recipe.steps * recipe.batch_rows * recipe.row_tokens
    most_bytes_per_token = 5
    rows = token_rows(tokenizer, _take(documents, num_tokens * most_bytes_per_token), recipe.row_tokens)
    model: PreTrainedModel
    if job.start is None:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model(recipe.architecture, vocab_size=len(tokenizer), **_shape(recipe), **ids)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(job.start, dtype=torch.float32)

    reported = 0.0

    def on_step(step: int, loss: float) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_EVERY_S or step == recipe.steps:
            reported = time.monotonic()
            report(0.05 + 0.94 * step / recipe.steps, f"step {step}/{recipe.steps}, {loss:.2f} nats a token")

    pretrain(
        model,
        rows,
        steps=recipe.steps,
        batch_rows=recipe.batch_rows,
        seed=job.seed,
        on_step=on_step,
        lr_scale=job.lr_scale,
    )
    model.save_pretrained(job.folder)
    tokenizer.save_pretrained(job.folder)
    report(1.0, "done")


def _shape(recipe: Recipe) -> dict[str, Any]:
    """The architecture's own names for a model's size."""
    hidden, layers, heads = recipe.hidden_size, recipe.num_layers, recipe.hidden_size // recipe.head_size
    if recipe.architecture == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return {
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": recipe.row_tokens,
            **no_dropout,
        }
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": recipe.row_tokens,
        "tie_word_embeddings": True,
    }
    if recipe.architecture == "gpt_neox":
        return shape | {"intermediate_size": 4 * hidden, "rotary_pct": 1.0}
    gated = 8 * hidden // 3 // 32 * 32
    return shape | {"intermediate_size": gated, "num_key_value_heads": heads, "head_dim": recipe.head_size}


def _take(sources: Sequence[Sequence[str]], num_bytes: int) -> list[str]:
    """Documents of each source in turn until each has given its part of `num_bytes`."""
    room = [num_bytes / len(sources)] * len(sources)
    taken = []
    for turn in itertools.zip_longest(*sources):
        for number, document in enumerate(turn):
            if document is not None and room[number] > 0:
                taken.append(document)
                room[number] -= len(document.encode())
    return taken


# ---------------------------------------------------------------------------------- processes


def run_processes(jobs: Mapping[str, Job], on_progress: OnProgress) -> None:
    """Build all models at once, one process and one thread each; stop them all if one fails."""
    context = get_context("spawn")
    running: dict[Connection, tuple[str, BaseProcess]] = {}
    processes: list[BaseProcess] = []
    process: BaseProcess
    try:
        for name, job in jobs.items():
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_in_process, args=(sender, job), name=f"zoo-{name}", daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            running[receiver] = (name, process)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                name, process = running[connection]
                try:
                    kind, *message = json.loads(connection.recv_bytes())
                except EOFError:
                    process.join()
                    del running[connection]
                    if process.exitcode != 0:
                        raise ModelError(
                            f"quickstart model {name!r}: its process ended with code {process.exitcode}; "
                            "a negative one is a signal, and -9 most often means too little memory"
                        ) from None
                    continue
                if kind == "failed":
                    raise ModelError(f"quickstart model {name!r} could not be built:\n{message[0]}")
                on_progress(name, *message)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _in_process(sender: Connection, job: Job) -> None:
    """Entry of a process. Ctrl-C is the parent's to handle; without a parent, the next report ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def send(*message: Any) -> None:
        sender.send_bytes(json.dumps(message).encode())

    try:
        _build_model(job, lambda share, message: send("progress", share, message))
    except BrokenPipeError:
        os._exit(1)
    except Exception:
        send("failed", traceback.format_exc())


# ---------------------------------------------------------------------------------- the cache


@contextmanager
def _lock(path: Path, on_progress: OnProgress) -> Iterator[bool]:
    """Held by one build at a time; the system frees it when its holder dies.

    Yields:
        False where the file system has no locks: two builds may run, and the first to finish wins.
    """
    with path.open("w") as file:
        while (is_held := try_lock(file)) is False:
            on_progress("text", 0.0, f"waiting for another build ({path})")
            time.sleep(0.5)
        yield is_held is True


def _rename(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
