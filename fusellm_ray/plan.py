"""Everything that can be refused before a GPU is taken, and the plan of a run in figures.

`preflight` is what every run does first; `make_plan` adds the estimates that `fusellm-ray check` prints;
`require_resources` compares the run's demand with the cluster.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from fusellm_ray.alignment.project import Aligner
from fusellm_ray.alignment.statistics import Sequences, kind_shares, position_kinds
from fusellm_ray.cluster import cluster_address
from fusellm_ray.config import Config, Resources, SimulatedEngine, TargetConfig, TeacherConfig, VllmEngine
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import CheckpointError, ClusterError, ConfigError, CorpusError, TokenizerError
from fusellm_ray.models import ModelFacts, build_on_meta, check_skeleton, model_facts, weights_fingerprint
from fusellm_ray.observe.sinks import require_packages
from fusellm_ray.perplexity import held_out_documents
from fusellm_ray.target.checkpoint import explain_changes
from fusellm_ray.target.quantise import require_bitsandbytes
from fusellm_ray.target.storage import Checkpoints
from fusellm_ray.teachers.scoring import teacher_identity

Node = Mapping[str, Any]
"""A node as ray.nodes() describes it; its Resources and Labels are read."""

SAMPLE_ROWS = 8
"""Rows of the corpus on which `check` measures alignment."""

_RARE = "é漢ع🜁"
"""Characters of several scripts: a tokenizer that cannot fall back on bytes lacks some."""

_OPTIMISER_BYTES = 16
"""Bytes a trained parameter needs: float32 weight, gradient and two Adam moments."""
_FROZEN_BYTES = 4
"""Bytes a frozen one needs: its float32 weight."""
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """One teacher's part of the plan."""

    name: str
    facts: ModelFacts | None
    """None for a simulated teacher."""
    replicas: str
    memory_bytes: int
    wire_bytes_per_token: float
    coverage: float
    """Share of target positions on the sample that get a distribution."""
    tokens_per_target_token: float
    shared_boundaries: float
    """Share of the sample's positions whose boundary is one of the teacher's, too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will start and move."""

    target: ModelFacts
    workers: int
    tokens_per_step: int
    target_memory_bytes: int
    """Weights, gradients and optimiser state of one rank."""
    teachers: tuple[TeacherPlan, ...]
    demand: dict[str, float]
    warnings: tuple[str, ...] = field(default=())


def preflight(config: Config) -> dict[str, Any]:
    """Load what is cheap to load, refuse what cannot work, and return the run's identity for its checkpoints.

    The identity is JSON-able, and equal for all attempts at a run: what a resume must not find changed.

    Raises:
        ConfigError, ModelError, TokenizerError, CorpusError: the first thing that cannot work.
    """
    require_packages(config.run.sinks)
    skeleton = build_on_meta(config.target)
    check_skeleton(skeleton, config.target.attention)
    target = model_facts(config.target)
    if config.corpus.row_tokens > target.max_context:
        raise ConfigError(
            f"corpus.row_tokens={config.corpus.row_tokens} exceeds what target {config.target.model} reads at once "
            f"({target.max_context} tokens); lower it to at most {target.max_context}"
        )
    if config.target.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("target.lora needs PEFT, which is not installed: pip install peft")
    if config.target.lora is not None and config.target.lora.quantise is not None:
        require_bitsandbytes()
    if config.target.lora is not None:
        from fusellm_ray.target.model import add_adapters

        add_adapters(skeleton, config.target.lora)
    tokenizer = ByteTokenizer.of_model(config.target, target.vocab_size)
    teachers = {}
    for i, teacher in enumerate(config.active_teachers):
        _, own_tokenizer = _checked_tokenizer(i, teacher, tokenizer)
        if isinstance(teacher.engine, VllmEngine):
            _check_vllm(f"teachers[{i}] ({teacher.name})", teacher, teacher.engine)
        teachers[teacher.name] = teacher_identity(teacher, config.alignment, own_tokenizer, tokenizer)
    corpus = Corpus.open(config.corpus, config.run.seed)
    if config.evaluation.sources:
        documents = held_out_documents(config.evaluation.sources, config.evaluation.max_bytes)
        scored = {d.domain for d in documents if len(tokenizer.sequence(d.text, False).ids) > 1}
        for source in config.evaluation.sources:
            if source.name not in scored:
                raise CorpusError(
                    f"evaluation source {source.name!r}: holds no document of two tokens to score"
                )
    _check_prompts(config, tokenizer, target)
    return {
        "target": _target_identity(config.target),
        "target_tokenizer": tokenizer.fingerprint,
        "teachers": teachers,
        "corpus": corpus.identity(),
        "row_tokens": config.corpus.row_tokens,
        "batch_rows": config.training.batch_rows,
        "seed": config.run.seed,
    }


def _check_vllm(where: str, teacher: TeacherConfig, engine: VllmEngine) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{where}: engine.type=vllm, and vllm is not installed; install the gpu or cpu extra, or use the "
            "transformers engine"
        )
    if not engine.args and engine.lora is None:
        return  # spares the import, ten seconds
    try:
        with mock.patch.dict(os.environ):  # vllm sets variables for processes of its own, not for Ray's
            from fusellm_ray.teachers.vllm import check_settings
    except ConfigError:  # it may need what only the replicas' nodes have; they check the same
        return
    check_settings(teacher.name, engine)


def changes_since(saved: dict[str, Any], identity: dict[str, Any], *, allow: bool, folder: str) -> list[str]:
    """What has changed since a run's checkpoint, a line each.

    Args:
        saved: state.json of the checkpoint.
        identity: as `preflight` made it.
        folder: the run's, for the message.

    Raises:
        CheckpointError: something has, and it is not allowed to.
    """
    changes = explain_changes(saved["identity"], identity)
    if changes and not allow:
        raise CheckpointError(
            f"{folder}: the checkpoint of step {saved['step']} belongs to another run:\n  "
            + "\n  ".join(changes)
            + "\nuse another run.name, or --allow-changes to go on regardless"
        )
    return changes


def _check_prompts(config: Config, tokenizer: ByteTokenizer, target: ModelFacts) -> None:
    evaluation = config.evaluation
    for i, prompt in enumerate(evaluation.prompts):
        length = len(tokenizer.sequence(prompt, ends_document=False).ids)
        if length == 0:
            raise ConfigError(
                f"evaluation.prompts[{i}]={prompt!r} has no token to go on from; give it some text"
            )
        if length + evaluation.sample_tokens > target.max_context:
            raise ConfigError(
                f"evaluation.prompts[{i}] has {length} tokens and evaluation.sample_tokens={evaluation.sample_tokens}; "
                f"target {config.target.model} reads {target.max_context} at once: shorten one of them"
            )


@dataclass(frozen=True, slots=True)
class _Asking:
    """Processes of one kind, each of which asks for the same."""

    who: str
    count: int
    """At least."""
    amounts: dict[str, float]
    where: Resources
    """Its labels say on which nodes."""

    def __str__(self) -> str:
        amounts = ", ".join(f"{name} {amount:g}" for name, amount in self.amounts.items())
        labels = ", ".join(f"{name}={value}" for name, value in self.where.labels.items())
        return f"{self.who}: asked {self.count} × ({amounts or 'nothing'}){labels and f' on nodes with {labels}'}"

    def room(self, nodes: Sequence[Node]) -> float:
        """How many of them these nodes would hold, were they empty."""
        return sum(
            min(
                (_times(name, much, node["Resources"]) for name, much in self.amounts.items()),
                default=math.inf,
            )
            for node in nodes
            if self.where.label_matches(node.get("Labels", {}))
        )


def _times(name: str, amount: float, resources: Mapping[str, float]) -> int:
    there = resources.get(name, 0.0)
    if name == "GPU" and amount < 1:  # a fraction is one of a single GPU
        return int(there) * int(1 / amount + 1e-6)
    return int(there / amount + 1e-6)


def _asking(config: Config, *, with_teachers: bool) -> list[_Asking]:
    asking: list[_Asking] = []
    for teacher in config.active_teachers if with_teachers else ():
        asking += _asking_of(teacher, teacher.replicas.min)
    return [*asking, _Asking("ranks", config.trainer.workers.min, rank_resources(config), Resources())]


def rank_resources(config: Config) -> dict[str, float]:
    """What each rank asks for, as Ray Train counts: its GPU, or else one CPU, unless it is told what to ask for."""
    own = {"GPU": 1.0} if config.trainer.use_gpu else {}
    told = config.trainer.resources_per_worker
    return _positive(own | told if told else own or {"CPU": 1.0})


def _asking_of(teacher: TeacherConfig, replicas: int) -> list[_Asking]:
    own = teacher.resources
    asking = [_Asking(f"teacher {teacher.name}", replicas, _positive(own.amounts), own)]
    if workers := replicas * teacher.num_worker_gpus:
        asking.append(_Asking(f"vLLM of teacher {teacher.name}", workers, {"GPU": 1.0}, Resources()))
    return asking


def _positive(amounts: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in amounts.items() if amount}


def demand(
    config: Config, *, with_teachers: bool = True, beside: Sequence[TeacherConfig] = ()
) -> dict[str, float]:
    """Resources that the run needs at least, by Ray's names; `beside` it teachers of other runs, fully grown."""
    needs: dict[str, float] = {}
    others = itertools.chain.from_iterable(_asking_of(teacher, teacher.replicas.max) for teacher in beside)
    for asking in [*_asking(config, with_teachers=with_teachers), *others]:
        for name, amount in asking.amounts.items():
            needs[name] = needs.get(name, 0.0) + amount * asking.count
    return needs


def fits_beside(config: Config, others: Sequence[TeacherConfig]) -> bool:
    """Whether the cluster, as large as it is now, has in all what the run and these teachers, fully grown, need."""
    import ray

    have, needs = ray.cluster_resources(), demand(config, beside=others)
    return all(have.get(name, 0.0) + 1e-6 >= amount for name, amount in needs.items())


def describe_demand(config: Config) -> str:
    """What the run asks for at least, and what the cluster has in all and free."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"{name}: asked {amount:g}, there {have.get(name, 0.0):g}, free {free.get(name, 0.0):g}"
        for name, amount in demand(config).items()
    )


def require_resources(
    config: Config, *, has_teachers: bool = False, nodes: Sequence[Node] | None = None
) -> str | None:
    """Refuse a run that this cluster can never hold.

    Args:
        has_teachers: they are up already, and ask for nothing more.
        nodes: the cluster's; default: those of the cluster that this process has joined.

    Returns:
        What is missing now, where the cluster may still grow (a joined cluster with an autoscaler); else None.

    Raises:
        ClusterError: the private cluster of this machine is too small.
        ConfigError: a teacher needs a cluster to join.
    """
    if not has_teachers and not cluster_address():
        _refuse_workers_of_a_private_cluster(config)
    nodes = _joined_nodes() if nodes is None else nodes
    have: dict[str, float] = defaultdict(float)
    for name, amount in itertools.chain.from_iterable(node["Resources"].items() for node in nodes):
        have[name] += amount
    missing = [
        f"{name}: asked {amount:g}, there {have[name]:g}"
        for name, amount in demand(config, with_teachers=not has_teachers).items()
        if have[name] + 1e-6 < amount
    ]
    for asking in _asking(config, with_teachers=not has_teachers):
        if (room := asking.room(nodes)) < asking.count:
            missing.append(f"{asking}, room for {room}")
    if not missing:
        return None
    text = "; ".join(missing)
    if not cluster_address():
        raise ClusterError(
            f"this machine is too small for the run ({text}); lower trainer.workers, teachers' replicas or their "
            "resources (fractions share a core), or set RAY_ADDRESS to a larger cluster (`check --no-cluster` looks "
            "at the config alone)"
        )
    return text


def _refuse_workers_of_a_private_cluster(config: Config) -> None:
    """vLLM's engine core could not join it, and would wait: its Ray listens on the loopback alone."""
    for i, teacher in enumerate(config.active_teachers):
        if teacher.num_worker_gpus:
            raise ConfigError(
                f"teachers[{i}] ({teacher.name}): engine.args.distributed_executor_backend=ray needs a cluster, and "
                f"RAY_ADDRESS is not set; set it, or leave that argument out and set resources.num_gpus="
                f"{teacher.num_worker_gpus} to use this machine's"
            )


def unused_gpus(config: Config, *, nodes: Sequence[Node] | None = None) -> list[str]:
    """What will compute on CPUs although the cluster has GPUs: allowed, and slow where it was not meant."""
    nodes = _joined_nodes() if nodes is None else nodes
    gpus = sum(node["Resources"].get("GPU", 0.0) for node in nodes)
    if not gpus:
        return []
    on_cpu = [
        f"teacher {teacher.name} (resources.num_gpus=0)"
        for teacher in config.active_teachers
        if not teacher.resources.num_gpus and not _gets_gpus_otherwise(teacher)
    ]
    if not config.trainer.use_gpu:
        on_cpu.append("ranks (trainer.use_gpu=false)")
    return [f"computes on CPUs, though there are {gpus:g} GPUs: {', '.join(on_cpu)}"] if on_cpu else []


def _gets_gpus_otherwise(teacher: TeacherConfig) -> bool:
    engine = teacher.engine
    return isinstance(engine, SimulatedEngine) or (isinstance(engine, VllmEngine) and engine.asks_ray_itself)


def _joined_nodes() -> list[Node]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _unspelt(who: str, tokenizer: ByteTokenizer) -> list[str]:
    """A run ends where it meets a character that has no token, which the sample may not hold."""
    outcomes = zip(_RARE, tokenizer.encode_each(list(_RARE)), strict=True)
    missing = [repr(char) for char, outcome in outcomes if isinstance(outcome, TokenizerError)]
    if not missing:
        return []
    return [
        f"{who}: its tokenizer has no token for {', '.join(missing)}, for instance; a document with such a character "
        "ends the run: take such characters out of the corpus, or use a tokenizer with byte fallback"
    ]


def _this_machine() -> Node:
    """The node that a private Ray would have here, as `train` starts one without RAY_ADDRESS."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    spec = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
    return {"Resources": spec.to_resource_dict(), "Labels": spec.labels}


def make_plan(config: Config, *, with_cluster: bool = True) -> Plan:
    """Check the run as `train` would, and estimate what it will take.

    Args:
        with_cluster: also compare with the resources of the cluster (RAY_ADDRESS) or of this machine.
    """
    identity = preflight(config)
    checkpoints = Checkpoints(config.run.storage, config.run.name)
    if (saved := checkpoints.latest_state()) is not None:
        changes_since(saved, identity, allow=False, folder=checkpoints.folder)
    target = model_facts(config.target)
    tokenizer = ByteTokenizer.of_model(config.target, target.vocab_size)
    corpus = Corpus.open(config.corpus, config.run.seed)
    reader = ShardReader(corpus, tokenizer, 0, config.training.batch_rows, config.corpus.row_tokens)
    segments = list(itertools.chain.from_iterable(reader.next_row().segments for _ in range(SAMPLE_ROWS)))
    warnings = _unspelt("target", tokenizer)
    teachers = []
    for i, teacher in enumerate(config.active_teachers):
        facts, own_tokenizer = _checked_tokenizer(i, teacher, tokenizer)
        warnings += _unspelt(f"teacher {teacher.name}", own_tokenizer)
        encodings = [own_tokenizer.sequence(s.text.decode(), s.ends_document) for s in segments]
        aligner = Aligner(own_tokenizer, tokenizer, config.alignment, teacher.top_k)
        shares = kind_shares(
            [
                position_kinds(aligner, Sequences(s.text, s.ids, s.ends, e.ids, e.ends))
                for s, e in zip(segments, encodings, strict=True)
            ]
        )
        context = teacher.max_context or (facts.max_context if facts else None)
        longest = max(len(e.ids) for e in encodings)
        if context is not None and longest > context:
            warnings.append(
                f"teacher {teacher.name}: a row takes up to {longest} of its tokens and it reads {context} at once; "
                "rows are split for it, which costs it context"
            )
        if teacher.trust_remote_code:
            warnings.append(f"teacher {teacher.name}: runs code that ships with {teacher.model}")
        id_bytes = 2 if target.vocab_size <= 1 << 16 else 4
        dtype = getattr(teacher.engine, "dtype", "auto")
        teachers.append(
            TeacherPlan(
                name=teacher.name,
                facts=facts,
                replicas=f"{teacher.replicas.min}..{teacher.replicas.max}",
                memory_bytes=facts.num_parameters * _DTYPE_BYTES[dtype] if facts else 0,
                wire_bytes_per_token=teacher.top_k * (id_bytes + 2) + 4 + 1 / 8,
                coverage=1.0 - shares["none"] - shares["one_hot"],
                tokens_per_target_token=sum(len(e.ids) for e in encodings)
                / sum(len(s.ids) for s in segments),
                shared_boundaries=shares["exact"] + shares["prefix"],
            )
        )
    if config.target.trust_remote_code:
        warnings.append(f"target: runs code that ships with {config.target.model}")
    if with_cluster:
        warnings += _compare_with_cluster(config)
    return Plan(
        target=target,
        workers=config.trainer.workers.min,
        tokens_per_step=config.training.batch_rows * config.corpus.row_tokens,
        target_memory_bytes=_target_memory(config),
        teachers=tuple(teachers),
        demand=demand(config),
        warnings=tuple(warnings),
    )


def _target_memory(config: Config) -> int:
    """Bytes of weights, gradients and optimiser state on one rank: sharded, but for weights in 4 bits."""
    from fusellm_ray.target.model import add_adapters, transformer_blocks

    lora = config.target.lora
    model = build_on_meta(config.target)
    in_4_bits: set[Any] = set()
    if lora is not None:
        if lora.quantise is not None:  # the blocks' linear layers
            in_4_bits = {p for block in transformer_blocks(model) for p in block.parameters() if p.dim() == 2}
        add_adapters(model, lora)
    sharded = sum(
        p.numel() * (_OPTIMISER_BYTES if p.requires_grad else _FROZEN_BYTES)
        for p in model.parameters()
        if p not in in_4_bits
    )
    return sharded // config.trainer.workers.min + sum(p.numel() for p in in_4_bits) // 2


def print_plan(plan: Plan) -> None:
    """The plan for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="processes", title_justify="left")
    for heading in ("role", "model", "parameters", "processes", "memory each"):
        table.add_column(heading, justify="left" if heading in ("role", "model") else "right")
    table.add_row(
        "trainer rank",
        plan.target.architecture,
        f"{plan.target.num_parameters / 1e6:,.1f} M",
        str(plan.workers),
        f"{plan.target_memory_bytes / 2**30:.2f} GiB + activations",
    )
    for teacher in plan.teachers:
        table.add_row(
            f"teacher {teacher.name}",
            teacher.facts.architecture if teacher.facts else "simulated",
            f"{teacher.facts.num_parameters / 1e6:,.1f} M" if teacher.facts else "none",
            teacher.replicas,
            f"{teacher.memory_bytes / 2**30:.2f} GiB + activations",
        )
    console.print(table)
    if plan.teachers:
        table = Table(title=f"alignment, on {SAMPLE_ROWS} rows of the corpus", title_justify="left")
        for heading in (
            "teacher",
            "coverage",
            "boundaries shared",
            "its tokens / target token",
            "wire bytes / token",
        ):
            table.add_column(heading, justify="left" if heading == "teacher" else "right")
        for teacher in plan.teachers:
            table.add_row(
                teacher.name,
                f"{teacher.coverage:.3f}",
                f"{teacher.shared_boundaries:.3f}",
                f"{teacher.tokens_per_target_token:.2f}",
                f"{teacher.wire_bytes_per_token:.0f}",
            )
        console.print(table)
    console.print(f"tokens a step: {plan.tokens_per_step:,}")
    console.print(
        "asks of the cluster: " + ", ".join(f"{name} {amount:g}" for name, amount in plan.demand.items())
    )
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    console.print("nothing stands against this run", style="green")


def _compare_with_cluster(config: Config) -> list[str]:
    import ray

    from fusellm_ray.exposure import warn_of_open_cluster
    from fusellm_ray.teachers.attach import join_cluster

    address = cluster_address()
    if address is None:
        here = [_this_machine()]
        require_resources(config, nodes=here)
        return unused_gpus(config, nodes=here)
    dashboard_url = join_cluster(address)
    try:
        missing = require_resources(config)
        warnings = [*warn_of_open_cluster(dashboard_url), *unused_gpus(config)]
    finally:
        ray.shutdown()
    if missing:
        wait = config.run.start_timeout_s
        warnings.append(
            f"the cluster must grow first ({missing}); a run waits {wait:.0f} s for it, then gives up"
        )
    return warnings


def teacher_tokenizer(teacher: TeacherConfig) -> tuple[ModelFacts | None, ByteTokenizer]:
    """A teacher's facts, None where it is simulated, and its tokenizer."""
    facts = None if isinstance(teacher.engine, SimulatedEngine) else model_facts(teacher)
    return facts, ByteTokenizer.of_model(teacher, facts.vocab_size if facts else None)


def _checked_tokenizer(
    index: int, teacher: TeacherConfig, target: ByteTokenizer
) -> tuple[ModelFacts | None, ByteTokenizer]:
    facts, tokenizer = teacher_tokenizer(teacher)
    for name, vocab_size in ((teacher.name, tokenizer.vocab_size), ("the target", target.vocab_size)):
        if teacher.top_k > vocab_size:
            raise ConfigError(
                f"teachers[{index}].top_k={teacher.top_k} exceeds the vocabulary of {name} ({vocab_size}); "
                f"lower it to at most {vocab_size}"
            )
    return facts, tokenizer


def _target_identity(target: TargetConfig) -> dict[str, Any]:
    settings = target.model_dump(mode="json", include={"model", "revision", "lora"}, exclude_none=True)
    return settings | {"weights": weights_fingerprint(target)}
