"""The configuration of a run: one frozen tree, checked before anything starts. `config_file` reads it from YAML.

Every key has a docstring under it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


class Frozen(BaseModel):
    """Immutable, and refuses keys it does not know and numbers that are infinite or none at all."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------- models


class ModelConfig(Frozen):
    """A Hugging Face causal language model: a folder, or a hub id."""

    model: str
    """Folder with config.json and safetensors, or a hub id."""
    revision: str | None = None
    """Hub revision: a branch, a tag or a commit."""
    trust_remote_code: bool = False
    """Run code that ships with the model. Off unless you have read that code."""

    @field_validator("model")
    @classmethod
    def _expand_home(cls, model: str) -> str:
        return os.path.expanduser(model)


class LoraConfig(Frozen):
    """Low-rank adapters in place of full fine-tuning (PEFT)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Drawn anew for every step and rank: above 0, other numbers of ranks or micro-batches take other steps."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    quantise: Literal["nf4"] | None = None
    """nf4: hold the frozen linear layers in 4 bits (QLoRA, bitsandbytes). Every rank holds all of them; adapters are
    sharded. Export merges into the model's own weights."""


class TargetConfig(ModelConfig):
    """The model that is trained."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision. Weights, gradients' reduction and optimiser state stay float32."""
    attention: Literal["sdpa", "flex_attention", "flash_attention_2", "eager"] = "sdpa"
    """Attention implementation; each keeps documents of one row apart."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more compute."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights between forward and backward: less memory, one more gathering."""
    compile: bool = False
    """torch.compile the transformer blocks."""
    lora: LoraConfig | None = None
    """Train adapters only; export merges them."""

    @model_validator(mode="after")
    def _can_compute(self) -> TargetConfig:
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError(
                "attention=flash_attention_2 computes in half precision only and dtype=float32; set target.dtype to "
                "bfloat16, or target.attention to sdpa"
            )
        return self


class TransformersEngine(Frozen):
    """The reference engine: a transformers model on any device."""

    type: Literal["transformers"] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_batch_tokens: int = Field(default=4096, ge=1)
    """Tokens (padding included) in one forward pass; bounds memory."""
    threads: int = Field(default=1, ge=1)
    """Intra-op threads on a CPU."""


class VllmEngine(Frozen):
    """vLLM, for GPUs."""

    type: Literal["vllm"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share the model; set resources.num_gpus to the same number. Across nodes, set num_gpus to 0,
    args.distributed_executor_backend to ray, and a custom resource or label that brings the replica to a node with
    GPUs: vLLM then asks Ray for its workers' GPUs itself. Only on a cluster that the run joins (RAY_ADDRESS), and not
    run yet: vLLM's CPU build cannot do it."""
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    """Prompt tokens in one engine step, at most: fewer where the logits of one prompt's tokens would not fit in memory,
    and a log line says so. They come beside what gpu_memory_utilization gives vLLM, in what it leaves of the GPU."""
    max_num_seqs: int = Field(default=64, ge=1)
    gpu_memory_utilization: float = Field(default=0.8, gt=0, le=1)
    lora: str | None = None
    """Folder of a PEFT adapter that is applied to the model."""
    metrics: bool = False
    """Also export vLLM's own metrics through Ray; costs time on the event loop in every engine step."""
    args: dict[str, Any] = {}
    """Any further engine argument, by vLLM's own name; checked against vLLM's."""

    @field_validator("args")
    @classmethod
    def _stages(cls, args: dict[str, Any]) -> dict[str, Any]:
        stages = args.get("pipeline_parallel_size", 1)
        if not isinstance(stages, int) or stages < 1:
            raise ValueError(f"pipeline_parallel_size={stages!r}: expected a number of at least 1")
        return args

    @property
    def num_ranks(self) -> int:
        """GPUs that one replica computes on."""
        return self.tensor_parallel_size * int(self.args.get("pipeline_parallel_size", 1))

    @property
    def asks_ray_itself(self) -> bool:
        """Whether vLLM asks Ray for the GPUs, in place of the replica."""
        return self.args.get("distributed_executor_backend") == "ray"

    def for_another_model(self) -> VllmEngine:
        """Without what belongs to the model: its adapter, and arguments other than where it runs."""
        places = ("pipeline_parallel_size", "distributed_executor_backend")
        return self.model_copy(
            update={"lora": None, "args": {key: self.args[key] for key in places if key in self.args}}
        )

    @property
    def num_worker_gpus(self) -> int:
        """GPUs that vLLM asks Ray for itself, besides what the replica asks for."""
        return self.num_ranks if self.asks_ray_itself else 0


class SimulatedEngine(Frozen):
    """No weights: a cost model with deterministic answers, to measure the pipeline itself."""

    type: Literal["simulated"]
    tokens_per_s: float | None = Field(default=None, gt=0)
    """Scoring speed of one replica; default: it costs nothing."""
    startup_s: float = Field(default=0.0, ge=0)
    jitter: float = Field(default=0.0, ge=0)
    """Standard deviation of a request's duration, as a share of it."""
    failure_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance that a request raises; the self-test at the start does not."""


EngineConfig = Annotated[TransformersEngine | VllmEngine | SimulatedEngine, Field(discriminator="type")]


class Replicas(Frozen):
    """How many copies of one teacher run at once."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min={self.min} exceeds max={self.max}; raise max or lower min")
        return self


def _refuse_duplicates(kind: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two {kind}s are named {twice[0]!r}; give each its own name")


def _check_amount(name: str, amount: float) -> None:
    """Refuse an amount of a Ray resource that Ray itself would refuse."""
    if amount < 0:
        raise ValueError(f"{name}: {amount} is below 0")
    if 0 < amount < _LEAST_AMOUNT:
        raise ValueError(f"{name}: {amount} is less than Ray counts; ask for 0 or at least {_LEAST_AMOUNT}")
    if name == "GPU" and amount > 1 and not amount.is_integer():
        raise ValueError(f"{name}: {amount} is neither a fraction of one GPU nor a whole number of them")


_LEAST_AMOUNT = 0.0001
_RAY_RESOURCES = {
    "CPU": "use num_cpus",
    "GPU": "use num_gpus",
    "memory": "leave it out",
    "object_store_memory": "leave it out",
}


class Resources(Frozen):
    """What one replica asks Ray for."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    """A fraction shares a GPU between replicas."""
    custom: dict[str, float] = {}
    """Custom Ray resources, for instance {teacher_slot: 1}."""
    labels: dict[str, str] = {}
    """Ray labels that its node must have, for instance {ray.io/accelerator-type: H100}; also "!H100", "in(H100, H200)"
    and "!in(...)"."""

    @property
    def amounts(self) -> dict[str, float]:
        """By Ray's names."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus} | self.custom

    @field_validator("num_cpus", "num_gpus")
    @classmethod
    def _countable(cls, amount: float, info: ValidationInfo) -> float:
        _check_amount({"num_cpus": "CPU", "num_gpus": "GPU"}[info.field_name or ""], amount)
        return amount

    @field_validator("custom")
    @classmethod
    def _custom(cls, custom: dict[str, float]) -> dict[str, float]:
        for name, amount in custom.items():
            if name in _RAY_RESOURCES:
                raise ValueError(f"{name} is no custom resource; {_RAY_RESOURCES[name]}")
            _check_amount(name, amount)
        return custom

    @field_validator("labels")
    @classmethod
    def _readable(cls, labels: dict[str, str]) -> dict[str, str]:
        for name, value in labels.items():
            if not re.fullmatch(r"!?([\w.-]+|in\([\w.-]+(, ?[\w.-]+)*\))", value):
                raise ValueError(
                    f"{name}: {value!r} is no label selector; write a, !a, in(a, b) or !in(a, b)"
                )
        return labels

    def label_matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels will do."""
        for name, selector in self.labels.items():
            value = selector.removeprefix("!")
            wanted = re.split(", ?", value[3:-1]) if value.startswith("in(") else [value]
            if (labels.get(name) in wanted) == selector.startswith("!"):
                return False
        return True


class ReaderConfig(ModelConfig):
    """A model that is read as it is: to learn from it, or to score it."""

    add_bos: bool | None = None
    """Begin each text with the tokenizer's BOS; default: where the tokenizer itself does. Converted folders (from
    GGUF, for instance) may have lost that, and some models, such as Gemma, predict badly without."""


class TeacherConfig(ReaderConfig):
    """A source model whose knowledge is fused into the target."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """How tables, metrics and errors call it."""
    engine: EngineConfig = TransformersEngine()
    top_k: int = Field(default=16, ge=1)
    """Candidates kept per position; the gold token is carried besides."""
    weight: float = Field(default=1.0, gt=0)
    """Its share under `fusion.rule: weighted`."""
    max_context: int | None = Field(default=None, ge=2)
    """Tokens the model reads at once; default: what its config says. vLLM starts only where the KV cache of so many
    fits beside the weights."""
    cache_bytes: int = Field(default=256 << 20, ge=0)
    """Memory a replica uses for its latest answers, so that the same text asked again (by another run of a sweep,
    by a resumed run) is not scored again; a token takes about 4 to 6 bytes a candidate. Answers from it may differ in
    their last bits from those to the same text in another batch. Each replica has its own; teachers that are up for
    several runs get a text at the same replica. 0: none."""
    replicas: Replicas = Replicas()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _fits_vllm(self) -> TeacherConfig:
        if not isinstance(self.engine, VllmEngine):
            return self
        if self.max_context == 2:
            raise ValueError(
                "max_context=2: vLLM generates one token after each prompt, which leaves prompts of one token, where "
                "there is nothing to predict; set it to at least 3"
            )
        num_gpus, ranks = self.resources.num_gpus, self.engine.num_ranks
        if self.engine.asks_ray_itself and num_gpus:
            raise ValueError(
                f"resources.num_gpus={num_gpus:g} would be held and not used, since with "
                f"engine.args.distributed_executor_backend=ray vLLM asks Ray for {ranks} GPUs itself; "
                "set resources.num_gpus to 0"
            )
        if num_gpus == 0:  # vLLM's build for CPUs, or it asks Ray itself
            return self
        if max(num_gpus, 1.0) != ranks:
            raise ValueError(
                f"engine.tensor_parallel_size × engine.args.pipeline_parallel_size = {ranks} GPUs in one replica, and "
                f"resources.num_gpus={num_gpus:g}; set num_gpus to {ranks}"
            )
        share, taken = min(num_gpus, 1.0), self.engine.gpu_memory_utilization
        if share <= taken:
            raise ValueError(
                f"resources.num_gpus={num_gpus:g} gives a replica {share:g} of a GPU's memory, and "
                f"engine.gpu_memory_utilization={taken:g} leaves nothing of it for logits; lower that to about "
                f"{0.8 * share:g}"
            )
        return self

    @property
    def num_worker_gpus(self) -> int:
        return self.engine.num_worker_gpus if isinstance(self.engine, VllmEngine) else 0

    @property
    def asks(self) -> dict[str, float]:
        """What one replica takes of Ray's resources, together with what its engine asks for itself."""
        own = self.resources.amounts
        return own | {"GPU": own["GPU"] + self.num_worker_gpus}


# ---------------------------------------------------------------------------------------- corpus


class SourceConfig(Frozen):
    """Documents of one domain. Give `path` (local files) or `dataset` (a Hugging Face dataset)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The domain: figures are shown per source."""
    path: str | None = None
    """A file, a folder or a glob pattern of JSONL, Parquet or text."""
    dataset: str | None = None
    """Hub id, or a folder written by `Dataset.save_to_disk`."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    """Of `path`; auto goes by the file's ending. A text file is one document."""
    field: str = "text"
    """The record's key (JSONL, Parquet, dataset) that holds the text."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the bytes read, relative to the other sources."""
    streaming: bool = False
    """Read a dataset as it comes instead of downloading it first."""

    @field_validator("path", "dataset")
    @classmethod
    def _expand_home(cls, place: str | None) -> str | None:
        return place if place is None else os.path.expanduser(place)

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(f"source {self.name!r}: give exactly one of path and dataset")
        ignored = {"subset", "split", "revision"} if self.path is not None else {"format"}
        fields = type(self).model_fields
        told = [name for name in sorted(ignored) if getattr(self, name) != fields[name].default]
        if told:
            origin = "path" if self.path is not None else "dataset"
            raise ValueError(
                f"source {self.name!r}: {', '.join(told)} mean nothing for a {origin}; leave them out"
            )
        return self


class CorpusConfig(Frozen):
    """What is read, and how it is cut into rows of target tokens."""

    sources: list[SourceConfig] = Field(min_length=1)
    row_tokens: int = Field(default=2048, ge=8)
    """Target tokens a row."""
    shuffle: bool = True
    """Visit documents in an order drawn from run.seed, another one each epoch (not for streaming sources)."""

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: list[SourceConfig]) -> list[SourceConfig]:
        _refuse_duplicates("source", [s.name for s in sources])
        return sources


# ---------------------------------------------------------------------------------------- method


class AlignmentConfig(Frozen):
    """How a teacher's distributions come to the target's positions and vocabulary."""

    sequence: Literal["span", "dtw"] = "span"
    """span: byte boundaries. dtw: the paper's dynamic time warping over token strings."""
    straddle: Literal["mask", "onehot", "condition"] = "condition"
    """What a position gets whose boundary lies inside a teacher token (span only)."""
    projection: Literal["exact", "mined", "prefix"] = "prefix"
    """How teacher ids become target ids; mined is the paper's."""

    @property
    def has_one_hot(self) -> bool:
        """Positions may hold the gold token alone, which costs no nats and says nothing of how good a teacher is."""
        return self.sequence == "dtw" or self.straddle == "onehot"


class FusionConfig(Frozen):
    """How several teachers become one distribution."""

    rule: Literal["min_ce", "avg_ce", "mean", "weighted", "none"] = "min_ce"
    """none: no teacher is listened to or started; the CLM baseline."""
    granularity: Literal["token", "segment", "row"] = "segment"
    """The unit over which min_ce and avg_ce compare teachers."""
    unit: Literal["nats_per_byte", "nats_per_token"] = "nats_per_byte"
    """Of the cross-entropies compared; nats_per_token (the paper) is per the teacher's own token. Under one-hot
    alignments bytes are of its own tokens, too."""
    temperature: float = Field(default=1.0, gt=0)
    """τ of avg_ce: weights are softmax(−CE / τ)."""
    paper_weights: bool = False
    """avg_ce weighs by softmax(exp(−CE)) as the published code does."""
    gate: Literal["none", "frozen_target", "live_target"] = "none"
    """When to listen. frozen_target (the paper): the target's initial self is one more teacher, with the first
    teacher's engine, resources and top_k. live_target: CLM only on segments where the target is, by now, better
    than the fused teachers."""


class ObjectiveConfig(Frozen):
    """loss = clm_weight · CLM + (1 − clm_weight) · divergence(fused ‖ target)."""

    clm_weight: float = Field(default=0.4, ge=0, le=1)
    """λ in the paper."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    tail: Literal["bucket", "renormalise", "drop"] = "bucket"
    """What becomes of the mass outside the top-k: one extra outcome, renormalised away, or ignored."""
    chunk_tokens: int = Field(default=512, ge=1)
    """Positions whose logits exist at once."""


class EarlyStop(Frozen):
    """Ends training where evaluations no longer improve; the run then counts as finished."""

    patience: int = Field(ge=1)
    """Evaluations in a row without an improvement of the mean bits per byte."""
    min_delta: float = Field(default=0.0, ge=0)
    """Bits per byte that an evaluation must be better to count as an improvement."""


_Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Frozen):
    """The optimisation."""

    steps: int = Field(ge=1)
    batch_rows: int = Field(default=8, ge=1)
    """Rows in one optimiser step, over all ranks."""
    micro_rows: int = Field(default=1, ge=1)
    """Rows in one forward pass of one rank."""
    lr: float = Field(default=1e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.008, ge=0, le=1)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of lr."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    max_skipped_steps: int = Field(default=3, ge=0)
    """Steps with a non-finite loss or gradient that are skipped before the run stops with an error."""
    early_stop: EarlyStop | None = None
    """Take it out of a run that stopped early to go on with it."""


class Workers(Frozen):
    """How many ranks train: a number, or as many as there is room for."""

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) else value

    @property
    def is_elastic(self) -> bool:
        return self.min != self.max

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min={self.min} exceeds max={self.max}; raise max or lower min")
        return self


class TrainerConfig(Frozen):
    """The Ray Train worker group."""

    workers: Workers = Workers(max=1)
    """Ranks. {min: 2, max: 8}: elastic; the group restarts from its latest checkpoint where nodes come or go. Global
    batches are the same on any number."""
    use_gpu: bool = False
    resources_per_worker: dict[str, float] = {}
    """Asked of Ray for each rank besides its GPU; for instance {train_slot: 1}."""
    threads: int = Field(default=1, ge=1)
    """Intra-op threads of a rank on a CPU."""
    max_failures: int = Field(default=3, ge=0)
    """Times the worker group is restarted from its last checkpoint."""

    @field_validator("resources_per_worker")
    @classmethod
    def _countable(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            _check_amount(name, amount)
        return resources


class StreamConfig(Frozen):
    """Requests from ranks to teachers."""

    in_flight_tokens: int = Field(default=65536, ge=1)
    """Target tokens of the batches a rank has asked for and not joined yet (one batch is always allowed). A rank's
    share of a step is one request, to one replica: replicas beyond the requests that fit have nothing to do."""
    in_flight_bytes: int = Field(default=256 << 20, ge=1 << 20)
    """Frame bytes a rank may have in flight over all teachers; keep well under the object store."""
    on_teacher_loss: Literal["wait", "drop", "fail"] = "wait"
    """wait: for a teacher that does not answer, `deadline_s` long, then end the run; what is trained is the same
    as if nothing had happened. fail: end the run after `loss_deadline_s`. drop: after `loss_deadline_s` go on with
    the other teachers (with none: CLM only), count the tokens, and take the teacher back when it answers again. A run
    begins only once every teacher is up."""
    deadline_s: float = Field(default=600.0, gt=0)
    """How long a rank waits for a teacher's answer, restarts included, before it gives up."""
    loss_deadline_s: float = Field(default=60.0, gt=0)
    """Without an answer for so long, a teacher counts as lost under drop and fail."""
    allow_spilling: bool = False
    """Run on a cluster whose nodes write objects to disk, or do not say whether they do: none is asked."""


class EvaluationConfig(Frozen):
    """Held-out text, scored during training and at its end in bits per byte, and prompts to go on from."""

    sources: list[SourceConfig] = []
    every_steps: int | None = Field(default=None, ge=1)
    """Default: at the end only."""
    max_bytes: int = Field(default=200_000, ge=1)
    """Bytes of each source that are scored."""
    prompts: list[str] = []
    """Texts that the target goes on from at each evaluation; the record has an event `sample` for each."""
    sample_tokens: int = Field(default=64, ge=1)
    """Target tokens of each sample; each costs a forward pass over all prompts."""
    sample_temperature: float = Field(default=0.0, ge=0)
    """0: the likeliest token each time. Draws depend on run.seed and the step alone."""

    @field_validator("sources")
    @classmethod
    def _distinct_and_alike(cls, sources: list[SourceConfig]) -> list[SourceConfig]:
        _refuse_duplicates("evaluation source", [s.name for s in sources])
        for source in sources:
            if source.weight != 1:
                raise ValueError(
                    f"evaluation source {source.name!r}: weight={source.weight:g} means nothing for held-out text, "
                    "of which each source gives max_bytes; leave it out"
                )
        return sources


class CheckpointConfig(Frozen):
    """When training state is saved, and how much of it is kept."""

    every_steps: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)
    """Latest checkpoints kept."""
    keep_best: bool = False
    """Keep, besides, the model with the least mean bits per byte on evaluation.sources; `export --step best`."""


class RunConfig(Frozen):
    """Where a run lives. The same name and storage again means: resume."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    storage: str = "~/fusellm_runs"
    """Folder or URI (gs://…, s3://bucket/runs?region=…&endpoint_override=…) reachable from every node; the keys of an
    object store come from the nodes' environment."""
    seed: int = 0
    start_timeout_s: float = Field(default=900.0, gt=0)
    """How long to wait for the cluster to give what the run asks for (an autoscaler may need minutes)."""
    sinks: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Where figures go besides metrics.jsonl. Addresses and keys: the services' own environment variables."""


FROZEN_TARGET = "frozen_target"
"""Name of the teacher that is the target's initial self."""


class Config(Frozen):
    """A run."""

    run: RunConfig
    target: TargetConfig
    teachers: list[TeacherConfig] = []
    corpus: CorpusConfig
    alignment: AlignmentConfig = AlignmentConfig()
    fusion: FusionConfig = FusionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig
    trainer: TrainerConfig = TrainerConfig()
    stream: StreamConfig = StreamConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.fusion.rule != "none" and not self.teachers:
            raise ValueError(
                f"fusion.rule={self.fusion.rule} needs teachers; add some or set fusion.rule=none"
            )
        _refuse_duplicates("teacher", [t.name for t in self.active_teachers or self.teachers])
        if self.trainer.resources_per_worker.get("GPU") and not self.trainer.use_gpu:
            raise ValueError(
                "trainer.resources_per_worker asks for GPUs and trainer.use_gpu is false; set it true"
            )
        share = self.trainer.resources_per_worker.get("GPU", 1.0)
        if self.trainer.use_gpu and share < 1 and self.trainer.workers.max > 1:
            raise ValueError(
                f"trainer.resources_per_worker.GPU={share:g} may put several of {self.trainer.workers.max} ranks "
                "on one GPU, which NCCL refuses; give each rank a GPU of its own, or set trainer.workers to 1"
            )
        if self.alignment.has_one_hot:
            self._refuse_comparison_of_one_hot()
        own = {name for name, amount in self.trainer.resources_per_worker.items() if amount}
        if self.target.attention in ("flex_attention", "flash_attention_2") and not self.trainer.use_gpu:
            raise ValueError(
                f"target.attention={self.target.attention} has no backward pass on a CPU and trainer.use_gpu is false; "
                "train on GPUs, or set target.attention to sdpa"
            )
        workers = self.trainer.workers
        if workers.is_elastic and not own - {"CPU", "GPU", "memory"}:
            raise ValueError(
                "trainer.workers is elastic, and trainer.resources_per_worker asks for no custom resource: Ray counts "
                "a node's CPUs and GPUs without what teachers take of them; give trainer nodes one, such as "
                "train_slot, and ask for {train_slot: 1}"
            )
        if workers.max > self.training.batch_rows:
            raise ValueError(
                f"trainer.workers={workers.max} exceeds training.batch_rows={self.training.batch_rows}: "
                "a rank would get no row; lower workers or raise batch_rows"
            )
        judged = [
            key
            for key, value in (
                ("training.early_stop", self.training.early_stop),
                ("checkpoint.keep_best", self.checkpoint.keep_best),
            )
            if value
        ]
        if judged and not (self.evaluation.sources and self.evaluation.every_steps):
            raise ValueError(
                f"{' and '.join(judged)} go by evaluations during training; give evaluation.sources and "
                "evaluation.every_steps"
            )
        return self

    def _refuse_comparison_of_one_hot(self) -> None:
        by_token = self.fusion.granularity == "token" and self.fusion.rule in ("min_ce", "avg_ce")
        if by_token or self.fusion.gate == "live_target":
            setting = "granularity=token" if by_token else "gate=live_target"
            raise ValueError(
                f"fusion.{setting} compares nats position by position, and with alignment.sequence="
                f"{self.alignment.sequence} and straddle={self.alignment.straddle} some positions hold the gold token "
                "alone, at no cost; take sequence=span with straddle=condition or mask, or another setting than this"
            )

    @property
    def active_teachers(self) -> list[TeacherConfig]:
        """The teachers this run starts: none for the CLM baseline; with `gate: frozen_target` one more."""
        if self.fusion.rule == "none":
            return []
        if self.fusion.gate != "frozen_target":
            return self.teachers
        own: dict[str, Any] = {key: getattr(self.target, key) for key in ModelConfig.model_fields}
        engine = self.teachers[0].engine
        if isinstance(engine, VllmEngine):
            own["engine"] = engine.for_another_model()
        frozen = self.teachers[0].model_copy(
            update=own | {"name": FROZEN_TARGET, "weight": 1.0, "max_context": None, "add_bos": None}
        )
        return [*self.teachers, frozen]
