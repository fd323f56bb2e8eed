"""A study: what several ways to improve one target are compared on, read from YAML and checked before anything starts.

    base   a run's configuration: target, teachers, corpus, budget, held-out text
    arms   what is compared: trained as `base` says but for a few settings, or made without training
    seeds  of the order of the data; every trained arm is trained with each

Trained arms see the same tokens in as many steps: an arm that changes target, corpus or budget, or that may stop
early, is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fusellm_ray.config import Config, Frozen, ModelConfig, ReaderConfig, TeacherConfig
from fusellm_ray.config_file import PRESETS, apply_override, parse_config, read_tree, set_dotted, validated
from fusellm_ray.credentials import refuse_credentials
from fusellm_ray.errors import ConfigError

_NAME = r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$"
_METHOD_SECTIONS = ("alignment", "fusion", "objective")
_FIELDS = {
    "train": {"teachers", "preset", "set"},
    "model": {"model", "teacher", "add_bos"},
    "ensemble": {"teachers"},
    "merge": {"teachers", "method", "parameters"},
}


class Arm(Frozen):
    """One thing that is compared."""

    name: str = Field(pattern=_NAME)
    kind: Literal["train", "model", "ensemble", "merge"] = "train"
    """model: a model as it is. ensemble: the mean of the teachers' distributions, at the target's tokens.
    merge: the teachers' weights merged, where all continue the target."""
    model: str | None = None
    """kind model: a folder or hub id; default: the untrained target."""
    teacher: str | None = None
    """kind model: a teacher of the base, by name."""
    add_bos: bool | None = None
    """Of `model`: begin each text with BOS; a teacher's and the target's are the base's."""
    teachers: list[str] | None = Field(default=None, min_length=1)
    """Of the base, by name; default: all. One, with fusion.rule mean, is ordinary knowledge distillation."""
    preset: str | None = None
    """A preset's alignment, fusion, objective and top_k in place of the base's; its budget and optimiser are not
    taken."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the run's configuration → values; none of run."""
    method: Literal["linear", "slerp", "ties", "dare", "sce"] | None = None
    """kind merge: how."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """kind merge: mergekit's own names."""

    @model_validator(mode="after")
    def _means_what_it_says(self) -> Arm:
        told = {name for name in self.model_fields_set if name not in ("name", "kind")}
        ignored = sorted(told - _FIELDS[self.kind])
        if ignored:
            raise ValueError(
                f"arm {self.name!r}: {', '.join(ignored)} mean nothing for kind {self.kind}; leave them out"
            )
        if self.model is not None and self.teacher is not None:
            raise ValueError(f"arm {self.name!r}: give model or teacher, not both")
        if self.add_bos is not None and self.model is None:
            raise ValueError(f"arm {self.name!r}: add_bos is of a model; give model, or set it in the base")
        if self.kind == "merge" and self.method is None:
            raise ValueError(f"arm {self.name!r}: kind merge needs a method")
        for key in self.set:
            if key.split(".")[0] == "run":
                raise ValueError(
                    f"arm {self.name!r}: set {key!r} means nothing: the study names and places its runs, and its "
                    "seeds hold for every arm; leave it out"
                )
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(
                f"arm {self.name!r}: preset {self.preset!r} is unknown; known: {', '.join(PRESETS)}"
            )
        return self

    @property
    def depends_on_seed(self) -> bool:
        return self.kind == "train" or self.method == "dare"


class Study(Frozen):
    """What is compared with what, and where it is kept."""

    name: str = Field(pattern=_NAME)
    storage: str = "~/fusellm_studies"
    """Local folder; the study's own is STORAGE/NAME. The same name again: finished arms are not redone."""
    build: Literal["domains", "quickstart", "text"] | None = None
    """Made on this machine first, from text found on it: the models of quickstart/domains.py, those of the quickstart,
    or only the text. Lies under ~/.cache/fusellm_ray/BUILD/latest."""
    seeds: list[int] = Field(default=[0], min_length=1)
    against: str
    """The arm that all others are compared with."""
    context: int | None = Field(default=None, ge=2)
    """Tokens read at once in the comparison; default: corpus.row_tokens."""
    resamples: int = Field(default=2000, ge=1)
    """Bootstrap draws."""
    keep_models: bool = False
    """Keep each trained arm's model in the study's folder; otherwise only its scores and metrics stay."""
    base: dict[str, Any]
    """A run's configuration, or in a study's file the path of one (relative to that file). Its run.name, run.storage
    and run.seed are not read."""
    arms: list[Arm] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed occurs twice: {seeds}")
        return seeds

    @model_validator(mode="after")
    def _arms_fit(self) -> Study:
        names = [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two arms are named {twice[0]!r}; give each its own name")
        if self.against not in names:
            raise ValueError(f"against={self.against!r} is none of the arms: {', '.join(names)}")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.storage).expanduser() / self.name

    def config(self, arm: Arm | None = None, *, seed: int = 0, run: str = "base") -> Config:
        """The run of a trained arm; without an arm, the base."""
        tree = copy.deepcopy(self.base)
        where = f"study {self.name}" + (f", arm {arm.name!r}" if arm else ", base")
        if arm is not None:
            if arm.preset is not None:
                preset = copy.deepcopy(PRESETS[arm.preset])
                tree |= {section: preset[section] for section in _METHOD_SECTIONS}
                tree["teachers"] = [teacher | preset["teachers"] for teacher in tree.get("teachers") or []]
            for dotted, value in arm.set.items():
                set_dotted(tree, dotted, value, where=f"{where}, set {dotted!r}")
            if arm.teachers is not None:
                tree["teachers"] = [t for t in tree.get("teachers") or [] if t.get("name") in arm.teachers]
        tree["run"] = (tree.get("run") or {}) | {
            "name": run,
            "storage": str(self.folder / "runs"),
            "seed": seed,
        }
        return parse_config(tree, where=where)

    def teachers(self, arm: Arm) -> list[TeacherConfig]:
        """The teachers of the base that an arm names."""
        teachers = self.config().teachers
        return teachers if arm.teachers is None else [t for t in teachers if t.name in arm.teachers]

    def model(self, arm: Arm) -> ModelConfig:
        """What an arm of kind model is."""
        base = self.config()
        if arm.teacher is not None:
            return next(t for t in base.teachers if t.name == arm.teacher)
        return ReaderConfig(model=arm.model, add_bos=arm.add_bos) if arm.model else base.target


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """Read a study, apply dotted overrides ("seeds=[0]", "base.training.steps=50"), and check all its arms.

    Raises:
        ConfigError: naming every problem, one a line.
    """
    path = Path(path)
    tree = read_tree(path)
    if isinstance(tree.get("base"), str):
        tree["base"] = read_tree(path.parent / tree["base"])
    for override in overrides:
        apply_override(tree, override)
    return parse_study(tree, where=str(path))


def parse_study(tree: dict[str, Any], where: str = "study") -> Study:
    """Validate an already parsed tree."""
    refuse_credentials(tree, where)
    study = validated(Study, tree, where)
    base = study.config()
    if not base.evaluation.sources:
        raise ConfigError(f"{where}: base.evaluation.sources is empty; give the held-out text to compare on")
    known = [teacher.name for teacher in base.teachers]
    for arm in study.arms:
        for name in [*(arm.teachers or []), *([arm.teacher] if arm.teacher else [])]:
            if name not in known:
                raise ConfigError(
                    f"{where}: arm {arm.name!r} names teacher {name!r}; the base has {', '.join(known) or 'none'}"
                )
        if arm.kind in ("ensemble", "merge") and len(study.teachers(arm)) < 2:
            raise ConfigError(f"{where}: arm {arm.name!r} of kind {arm.kind} needs two teachers or more")
        if arm.kind == "train":
            _check_equal_budget(base, study.config(arm), arm.name, where)
    return study


def _check_equal_budget(base: Config, config: Config, arm: str, where: str) -> None:
    if config.training.early_stop is not None:
        raise ConfigError(
            f"{where}: arm {arm!r} has training.early_stop, under which arms would end after different numbers of "
            "steps; leave it out"
        )
    sides = [c.model_dump(mode="json") for c in (base, config)]
    for key in ("target.model", "target.revision", "corpus", "training.steps", "training.batch_rows"):
        values: list[Any] = sides
        for part in key.split("."):
            values = [value[part] for value in values]
        if values[0] != values[1]:
            raise ConfigError(
                f"{where}: arm {arm!r} changes {key} ({values[0]} → {values[1]}); arms are compared at equal "
                "tokens and steps on one target: change it in the base, or write another study"
            )
