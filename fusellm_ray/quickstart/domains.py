"""The models of the study *Domains*: one base, and an expert of each domain that continues it.

    text of three domains ─ base: all of them ─┬─ python: more of its own domain
                                               ├─ prose
                                               └─ cpp

All share one tokenizer and one architecture, so that their weights can be merged: the setting of FuseLLM's
same-architecture study (Pythia-1B and three domains; arXiv 2401.10491, table 7), as small as two cores allow.
Built once, then cached, like the quickstart's zoo.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fusellm_ray.quickstart import text
from fusellm_ray.quickstart.text import DOMAINS, Sizes
from fusellm_ray.quickstart.zoo import (
    Job,
    OnProgress,
    Recipe,
    build_cached,
    point_latest,
    run_processes,
    version_of,
)

DEFAULT_CACHE = Path("~/.cache/fusellm_ray/domains")
TEXT_CACHE = Path("~/.cache/fusellm_ray/text")

_CODE = ("text.py", "tokenizer.py", "pretrain.py", "zoo.py", "domains.py")


@dataclass(frozen=True, slots=True)
class DomainsPlan:
    """Everything that the models depend on, but for the machine's text."""

    seed: int = 0
    sizes: Sizes = field(default_factory=lambda: Sizes(heldout=240_000))
    base: Recipe = field(default_factory=lambda: Recipe("llama", "byte_level", vocab_size=4096, steps=400))
    expert_steps: int = 800
    expert_lr_scale: float = 0.3
    """Of the base's learning rates: an expert that begins where the base ended, not anew."""


@dataclass(frozen=True, slots=True)
class Domains:
    """Where everything lies: Hugging Face folders under models/, JSONL under text/."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "models" / "base"

    def expert(self, domain: str) -> Path:
        return self.folder / "models" / domain

    def text(self, domain: str, part: str) -> Path:
        """Part: expert (what base and experts are trained on), train (the target's, unseen by them) or heldout."""
        return self.folder / "text" / f"{domain}.{part}.jsonl"


def build_domains(
    cache: Path = DEFAULT_CACHE, *, on_progress: OnProgress, plan: DomainsPlan | None = None
) -> Domains:
    """The models of a plan: from the cache, or built now; CACHE/latest points to them.

    Raises:
        CorpusError: this machine has too little text.
        ModelError: a model's process failed.
    """
    plan = plan or DomainsPlan()

    def build(folder: Path) -> None:
        _build(Domains(folder), plan, on_progress)
        (folder / "plan.json").write_text(json.dumps(asdict(plan), indent=2))

    folder = build_cached(cache, version_of(asdict(plan), _CODE), build, on_progress)
    point_latest(folder)
    return Domains(folder)


def build_text(cache: Path = TEXT_CACHE, *, on_progress: OnProgress) -> Path:
    """The text of the same domains alone, as `Domains.text` lays it out; CACHE/latest points to it."""
    plan = DomainsPlan()

    def build(folder: Path) -> None:
        _write_text(Domains(folder), plan, on_progress)

    content = {"seed": plan.seed, "sizes": asdict(plan.sizes)}
    folder = build_cached(cache, version_of(content, ("text.py", "domains.py")), build, on_progress)
    point_latest(folder)
    return folder


def _write_text(made: Domains, plan: DomainsPlan, on_progress: OnProgress) -> None:
    (made.folder / "text").mkdir()
    for number, domain in enumerate(DOMAINS):
        on_progress("text", number / len(DOMAINS), f"finding {domain} text")
        split = text.find_domain(domain, plan.sizes, plan.seed)
        for part in ("expert", "train", "heldout"):
            text.write_jsonl(made.text(domain, part), getattr(split, part))


def _build(made: Domains, plan: DomainsPlan, on_progress: OnProgress) -> None:
    _write_text(made, plan, on_progress)
    (made.folder / "models").mkdir()
    sources = {domain: made.text(domain, "expert") for domain in DOMAINS}
    run_processes({"base": Job(made.base, plan.base, tuple(sources.values()), plan.seed)}, on_progress)
    recipe = Recipe(**asdict(plan.base) | {"steps": plan.expert_steps})
    experts = {
        domain: Job(
            made.expert(domain),
            recipe,
            (sources[domain],),
            plan.seed + 1,  # another order than the base read
            start=made.base,
            lr_scale=plan.expert_lr_scale,
        )
        for domain in DOMAINS
    }
    run_processes(experts, on_progress)
