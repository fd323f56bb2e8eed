"""The engine for GPUs: vLLM's AsyncLLM, asked for prompts' logprobs. The only module that imports vllm.

    replica's process                              engine core's process (and one a GPU, where several)
    score ── prompt ids, prompt_logprobs=k ──────→ scheduler → forward → top-k of every position
    Scores ←── arrays [m-1, k+1], as they came ─── column 0: the prompt's own token, columns 1..k: the top k

vLLM turns those arrays into one Python object per candidate on the event loop, which costs many times what
reading the prompt costs. `_install_keep_arrays` takes the place of that step. It is vLLM's private code: where
it does not look as expected, `flat_logprobs` (public, slower) is used instead, and a warning says so. Two more ways
exist, logprobs of given ids (`prompt_logprob_token_ids`) and a pooler that takes the top k on the device; both are
for GPUs, and neither was written or measured. What was kept was measured on the CPU build only.

Logits are the peak of memory, and outside vLLM's memory profile: a step is as long as `largest_step` allows. vLLM's
V1 runner (CPUs, and GPUs without Triton) holds those of one prompt's part of a step at once; the V2 runner those of
1024 positions, for which the bound is stricter than it must be.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import spawn
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import psutil
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fusellm_ray.config import TeacherConfig, VllmEngine
from fusellm_ray.errors import ConfigError, EngineError, ModelError
from fusellm_ray.models import ModelFacts, model_facts
from fusellm_ray.teachers.engine import Scores, check_scores
from fusellm_ray.teachers.leash import Watch, on_leash, read_report

try:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs.engine import tokens_input
    from vllm.logprobs import FlatLogprobs
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors
except ImportError as error:
    raise ConfigError(
        f"engine.type=vllm: vllm cannot be imported ({error}); install fusellm-ray[gpu] or fusellm-ray[cpu]"
    ) from error

logger = logging.getLogger(__name__)
T = TypeVar("T")

_OWN_KEYS = {
    "model": "model",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "max_model_len": "max_context",
    "max_logprobs": "top_k",
    "dtype": "engine.dtype",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "max_num_seqs": "engine.max_num_seqs",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "enable_lora": "engine.lora",
    "max_lora_rank": "engine.lora",
    "lora_target_modules": "engine.lora",
    "data_parallel_size": "replicas",
}
"""vLLM's arguments that have a key of their own in a teacher's config."""
_FIXED = {
    "enable_prefix_caching": "a cached prefix has no logprobs",
    "kv_sharing_fast_prefill": "it skips positions whose logprobs are wanted",
    "logprobs_mode": "distributions are log softmax of raw logits",
    "runner": "prompts are scored by a generating model",
}
"""vLLM's arguments that scoring decides, and why."""

_CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model runs in the engine core's process, not in one more
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Ray places processes, vLLM must not pin them to cores
    "VLLM_CPU_CI_ENV": "1",  # no warm-up
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than most uses of a CPU engine
    "OMP_NUM_THREADS": "1",  # more threads than cores is several times slower than one
}
_CPU_KV_CACHE_BYTES = 1 << 30

_LOGITS_BYTES = 9
"""Of one vocabulary entry at one position while vLLM takes the top k: logits and logprobs in float32, a comparison."""
_SELF_TEST_TOKENS = 64
_SELF_TEST_NATS = 0.1
"""Mean difference between a prefix's logprobs alone and within its prompt that is rounding and no more."""
_DEATH_S = 5.0
_preparation_data = spawn.get_preparation_data


class VllmScorer:
    """Scores prompts with vLLM. Lives in one event loop; its engine core is a child process on a leash.

    vLLM generates one token after each prompt, so the longest prompt is one short of the model's context.
    """

    def __init__(self, teacher: TeacherConfig) -> None:
        """Start the engine; takes tens of seconds.

        Raises:
            ConfigError: an engine argument vLLM does not know, or that is not the user's to set.
            EngineError: vLLM does not start.
            ModelError: the model or the adapter cannot be found.
        """
        if not isinstance(teacher.engine, VllmEngine):
            raise ConfigError(f"teacher {teacher.name}: engine.type={teacher.engine.type}, expected vllm")
        self._where = f"teacher {teacher.name}"
        facts = model_facts(teacher)
        if teacher.top_k > facts.vocab_size:
            raise ConfigError(
                f"{self._where}: top_k={teacher.top_k} exceeds its vocabulary ({facts.vocab_size}); lower it"
            )
        _set_environment(teacher.engine)
        args = engine_args(teacher, facts)
        why_flat = _install_keep_arrays()
        if why_flat:
            logger.warning(
                "%s: scoring with flat_logprobs, which is several times slower: %s", self._where, why_flat
            )
        self._is_flat = why_flat is not None
        self._max_top_k = args.max_logprobs
        # A few more than run at once, so that the scheduler never waits for the next prompt to arrive.
        self.max_prompts = math.ceil(1.1 * teacher.engine.max_num_seqs)
        self._slots = asyncio.Semaphore(self.max_prompts)
        self._lora = _lora_request(teacher.engine.lora) if teacher.engine.lora else None
        self._request_ids = itertools.count()
        self._is_tested = False
        self._is_stopped = False
        with _alone_on_gpu(teacher.resources.num_gpus):
            self._start(args, [_ray_stat_logger()] if teacher.engine.metrics else None)
        self.vocab_size: int = self._engine.model_config.get_vocab_size()
        self.max_context: int = self._engine.model_config.max_model_len - 1
        self.model_cpu_s = math.nan  # the engine core is a process of its own

    def _start(self, args: AsyncEngineArgs, stat_loggers: list[Any] | None) -> None:
        before = set(multiprocessing.active_children())
        reader, writer = multiprocessing.Pipe(duplex=False)
        target = staticmethod(functools.partial(_run_engine_core, writer))
        try:
            with (
                mock.patch.object(EngineCoreProc, "run_engine_core", target),
                mock.patch.object(spawn, "get_preparation_data", _without_main),
            ):
                self._engine = AsyncLLM.from_engine_args(args, stat_loggers=stat_loggers)
        except Exception as error:
            writer.close()
            cause = read_report(reader) or f"{type(error).__name__}: {error}"
            raise EngineError(f"{self._where}: vLLM did not start; {cause}") from error
        # The child's copy is now the only one, so the pipe ends when the child does.
        writer.close()
        self._watch = Watch(reader, set(multiprocessing.active_children()) - before)

    @property
    def problem(self) -> str | None:
        death = self._watch.death
        return f"its engine died; {death.result()}" if death.done() else None

    async def score(self, prompts: Sequence[NDArray[np.int32]], top_k: int) -> list[Scores]:
        if not self._is_tested:
            await self.self_test()
        return await self._score(prompts, top_k)

    async def self_test(self) -> Scores:
        """Score a fixed passage whole and its first half alone; replicas of one teacher give the same answer.

        Raises:
            EngineError: a position's distribution changes with what comes after it.
        """
        length = min(_SELF_TEST_TOKENS, self.max_context)
        passage = ((np.arange(length) * 7919 + 13) % self.vocab_size).astype(np.int32)
        half = passage[: length // 2]
        whole, alone = await self._score([passage, half], self._max_top_k)
        rows = len(alone.gold_logprobs)
        difference = np.abs(whole.gold_logprobs[:rows] - alone.gold_logprobs).mean() if rows else 0.0
        if not difference <= _SELF_TEST_NATS:
            raise EngineError(
                f"{self._where}: self-test failed, a prefix's logprobs change by {difference:.2g} nats a "
                f"token with the text after it (limit {_SELF_TEST_NATS}); try engine.dtype=float32 "
                "or another version of vLLM"
            )
        self._is_tested = True
        return whole

    async def stop(self) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            await self._watch.stop(self._engine.shutdown)
            del self._engine  # its destructor fails once the interpreter is going down

    # ------------------------------------------------------------------------------------ requests

    async def _score(self, prompts: Sequence[NDArray[np.int32]], top_k: int) -> list[Scores]:
        if self._is_stopped:
            raise EngineError(f"{self._where}: asked to score after it was stopped")
        if top_k > self._max_top_k:
            raise EngineError(
                f"{self._where}: asked for top_k={top_k}, started for at most {self._max_top_k}"
            )
        for at, prompt in enumerate(prompts):
            self._check_prompt(at, prompt)
        params = SamplingParams(
            prompt_logprobs=top_k,
            flat_logprobs=self._is_flat,
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        requests = [
            asyncio.ensure_future(self._score_prompt(at, prompt, top_k, params))
            for at, prompt in enumerate(prompts)
        ]
        try:
            scores = await self._unless_dead(asyncio.gather(*requests))
        finally:
            for request in requests:
                request.cancel()  # where one has failed, the others would go on in the engine
        check_scores(scores, prompts, top_k, where=self._where)
        return scores

    def _check_prompt(self, at: int, prompt: NDArray[np.int32]) -> None:
        """An id outside the vocabulary would end the whole engine, so nothing unchecked is sent."""
        if not 1 <= len(prompt) <= self.max_context:
            raise EngineError(
                f"{self._where}: prompt {at} has {len(prompt)} tokens, limit {self.max_context}; "
                "split it, or raise max_context if the model can read more"
            )
        if not 0 <= prompt.min() <= prompt.max() < self.vocab_size:
            raise EngineError(
                f"{self._where}: prompt {at} has ids {prompt.min()}..{prompt.max()}, the model's are "
                f"0..{self.vocab_size - 1}; its tokenizer belongs to another model"
            )

    async def _score_prompt(
        self, at: int, prompt: NDArray[np.int32], k: int, params: SamplingParams
    ) -> Scores:
        if len(prompt) == 1:
            return Scores(np.empty((0, k), np.int32), np.empty((0, k), np.float32), np.empty(0, np.float32))
        request = tokens_input(prompt.tolist())
        request_id = str(next(self._request_ids))
        async with self._slots:
            replies = self._engine.generate(request, params, request_id, lora_request=self._lora)
            async for reply in replies:
                last = reply
        ids, logprobs = _as_arrays(last.prompt_logprobs, k)
        wanted = (len(prompt) - 1, k + 1)
        if ids.shape != wanted or logprobs.shape != wanted:
            raise EngineError(
                f"{self._where}: prompt {at} of {len(prompt)} tokens got arrays {ids.shape} and "
                f"{logprobs.shape}, expected {wanted}"
            )
        # Rows out of place are the one fault no later check would see (vllm issue 44106).
        misplaced = np.flatnonzero(ids[:, 0] != prompt[1:])
        if len(misplaced):
            row = misplaced[0]
            raise EngineError(
                f"{self._where}: prompt {at}, row {row} is about token {ids[row, 0]}, the prompt goes on "
                f"with {prompt[row + 1]} ({len(misplaced)} of {wanted[0]} rows differ)"
            )
        # Copies: the arrays are views of the whole message that they came in.
        return Scores(ids[:, 1:].copy(), logprobs[:, 1:].copy(), logprobs[:, 0].copy())

    async def _unless_dead(self, answers: asyncio.Future[T]) -> T:
        """Await answers for as long as the engine core lives; vLLM may wait for ever for a killed one."""
        death = self._watch.death
        try:
            await asyncio.wait((answers, death), return_when=asyncio.FIRST_COMPLETED)
            error = answers.exception() if answers.done() else None
            if answers.done() and (error is None or isinstance(error, EngineError)):
                return answers.result()
            # vLLM's own error for a dead engine comes before the reason does.
            await asyncio.wait((death,), timeout=_DEATH_S if self._engine.errored else 0.0)
        finally:
            answers.add_done_callback(_retrieve)
            answers.cancel()
        if self.problem is not None:
            raise EngineError(f"{self._where}: {self.problem}") from error
        raise EngineError(f"{self._where}: vLLM failed a request; {type(error).__name__}: {error}") from error


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Spare the log a line for each request that ends with its engine: one error tells of all."""
    if not future.cancelled():
        future.exception()


# ---------------------------------------------------------------------------------------- arguments


def engine_args(teacher: TeacherConfig, facts: ModelFacts) -> AsyncEngineArgs:
    """vLLM's arguments for scoring with this teacher: ours, then the config's `args`.

    Raises:
        ConfigError: `args` names something vLLM does not know, or that has a key of its own; or the logits of the
            shortest step do not fit in memory.
    """
    engine = teacher.engine
    assert isinstance(engine, VllmEngine)
    _check_args(teacher.name, engine.args)
    _check_device(teacher, engine)
    args: dict[str, Any] = {
        "model": os.path.expanduser(teacher.model),
        "revision": teacher.revision,
        "trust_remote_code": teacher.trust_remote_code,
        "config_format": "hf",
        "load_format": "safetensors",
        "language_model_only": True,
        "dtype": engine.dtype,
        "skip_tokenizer_init": True,
        "max_model_len": facts.max_context,
        "max_logprobs": teacher.top_k,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": _step_tokens(teacher, facts),
        "max_num_seqs": engine.max_num_seqs,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if engine.tensor_parallel_size > 1:
        args["distributed_executor_backend"] = "mp"
    if engine.lora:
        args |= _lora_args(engine.lora)
    if current_platform.is_cpu():
        args |= {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES}
    return AsyncEngineArgs(**(args | engine.args))


def _check_device(teacher: TeacherConfig, engine: VllmEngine) -> None:
    """Refuse what vLLM's build for GPUs cannot do, or would do behind Ray's back."""
    if current_platform.is_cpu():
        return
    where = f"teacher {teacher.name}"
    if not teacher.resources.num_gpus and not engine.asks_ray_itself:
        raise ConfigError(
            f"{where}: resources.num_gpus=0, and this build of vLLM computes on GPUs, of which it would take one that "
            f"Ray gives to others too; set it to {engine.num_ranks}"
        )
    if engine.lora and engine.dtype == "float32":
        raise ConfigError(
            f"{where}: vLLM's LoRA on GPUs computes in half precision only, and engine.dtype=float32; set it to "
            "bfloat16, or merge the adapter into the model"
        )


def _step_tokens(teacher: TeacherConfig, facts: ModelFacts) -> int:
    """`max_num_batched_tokens`, lowered where the logits of one prompt's part of a step would not fit in memory.

    vLLM's `long_prefill_token_threshold` bounds such a part only while other requests wait.
    """
    engine = teacher.engine
    assert isinstance(engine, VllmEngine)
    wanted = engine.max_num_batched_tokens
    spare = _spare_bytes(teacher, facts)
    fitting = largest_step(spare, facts.vocab_size)
    if fitting >= min(wanted, facts.max_context):
        return wanted
    where = f"teacher {teacher.name}: engine.max_num_batched_tokens={wanted}"
    reason = (
        f"the logits of {max(0, fitting)} positions (vocabulary {facts.vocab_size}) fit in half of the "
        f"{spare / 2**30:.1f} GiB that its weights and KV cache leave"
    )
    if fitting < engine.max_num_seqs:  # vLLM takes no fewer
        less = "use a larger machine" if current_platform.is_cpu() else "lower engine.gpu_memory_utilization"
        raise ConfigError(
            f"{where}: {reason}, and a step has at least engine.max_num_seqs={engine.max_num_seqs}; lower that, "
            f"or {less}"
        )
    logger.warning("%s: a step takes %d tokens instead: %s", where, fitting, reason)
    return fitting


def largest_step(spare_bytes: int, vocab_size: int) -> int:
    """Positions whose logits fit in half of the memory that nothing else takes; the rest is slack."""
    return spare_bytes // 2 // (_LOGITS_BYTES * vocab_size)


def _spare_bytes(teacher: TeacherConfig, facts: ModelFacts) -> int:
    """Memory that neither weights nor KV cache will take, about."""
    engine = teacher.engine
    assert isinstance(engine, VllmEngine)
    if current_platform.is_cpu():
        weights = facts.num_parameters * (4 if engine.dtype == "float32" else 2)
        kv_cache = engine.args.get("kv_cache_memory_bytes", _CPU_KV_CACHE_BYTES)
        return psutil.virtual_memory().available - weights - kv_cache
    # Other replicas may have the rest of the GPU. Without any of its own, vLLM's workers have whole ones.
    share = min(1.0, teacher.resources.num_gpus) or 1.0
    return int(current_platform.get_device_total_memory() * (share - engine.gpu_memory_utilization))


@contextlib.contextmanager
def _alone_on_gpu(num_gpus: float) -> Iterator[None]:
    """Let replicas that share a GPU start one after another: each takes memory that goes meanwhile for its own."""
    if not 0 < num_gpus < 1:
        yield
        return
    name = f"fusellm_ray_{os.getuid()}_gpu_{os.environ.get('CUDA_VISIBLE_DEVICES', '')}.lock"
    file = os.open(Path(tempfile.gettempdir()) / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def check_settings(name: str, engine: VllmEngine) -> None:
    """Refuse what `VllmScorer` would refuse of a teacher's engine, before anything starts.

    Raises:
        ConfigError: `args` names something vLLM does not know, or that has a key of its own.
        ModelError: the adapter cannot be found.
    """
    _check_args(name, engine.args)
    if engine.lora:
        _lora_args(engine.lora)


def _check_args(name: str, args: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for key in args:
        where = f"teacher {name}: engine.args.{key}"
        if key in _OWN_KEYS:
            raise ConfigError(f"{where}: has a key of its own; set the teacher's {_OWN_KEYS[key]} instead")
        if key in _FIXED:
            raise ConfigError(f"{where}: cannot be set, {_FIXED[key]}; remove it")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            meant = f"did you mean {near[0]!r}?" if near else "`vllm serve --help` lists them, with - for _"
            raise ConfigError(f"{where}: vLLM has no such engine argument; {meant}")


def _ray_stat_logger() -> Any:
    """vLLM's metrics through Ray's metrics port."""
    import ray.util.metrics
    from vllm.v1.metrics import ray_wrappers

    if (
        ray_wrappers.ray_metrics is None
    ):  # it also wants Ray Serve, of which it uses one name where there is one
        ray_wrappers.ray_metrics = ray.util.metrics
    return ray_wrappers.RayPrometheusStatLogger


def _set_environment(engine: VllmEngine) -> None:
    """Defaults for this process and the engine's; whatever the user has set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Forking a process that runs threads (Ray's, ours) can hang the child.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if engine.num_worker_gpus:
        import ray

        # vLLM says so itself only where it is left to choose spawn; its core would start a cluster of its own.
        if ray.is_initialized():
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
        logging.getLogger("vllm").setLevel(logging.WARNING)
    if current_platform.is_cpu():
        for key, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(key, value)


def _lora_args(folder: str) -> dict[str, Any]:
    """vLLM's arguments for an adapter.

    Raises:
        ModelError: it is not there, or vLLM would not apply all of it.
    """
    path = Path(folder).expanduser() / "adapter_config.json"
    if not path.is_file() or not path.with_name("adapter_model.safetensors").is_file():
        raise ModelError(
            f"adapter {folder}: expected adapter_config.json and adapter_model.safetensors in this folder; "
            "give one that PEFT's save_pretrained wrote"
        )
    try:
        with safe_open(path.with_name("adapter_model.safetensors"), framework="np") as file:
            modules = {re.split(r"\.lora_|\.weight$", key)[0].rpartition(".")[2] for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"adapter {folder}: its weights cannot be read ({error}); copy it again") from error
    at_ends = modules & {"embed_in", "embed_out", "embed_tokens", "lm_head", "wte"}
    if at_ends:  # of the positions of a prompt, vLLM adapts the logits of one
        raise ModelError(
            f"adapter {folder}: it changes {', '.join(sorted(at_ends))}, which vLLM would apply to some positions "
            "only; merge it into the model"
        )
    rank = json.loads(path.read_text())["r"]
    allowed = next((n for n in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank <= n), None)
    if allowed is None:
        raise ModelError(
            f"adapter {folder}: rank {rank} exceeds what vLLM takes (512); merge it into the model"
        )
    # Of all that could be adapted vLLM would wrap the head too, and then fail on several prompts.
    return {"enable_lora": True, "max_lora_rank": allowed, "lora_target_modules": sorted(modules)}


def _lora_request(folder: str) -> LoRARequest:
    return LoRARequest(lora_name="teacher", lora_int_id=1, lora_path=str(Path(folder).expanduser()))


# ---------------------------------------------------------------------------------------- raw arrays


def _install_keep_arrays() -> str | None:
    """Make vLLM, in this process, hand over prompt logprobs as arrays; returns why it cannot, if so."""
    stock = getattr(LogprobsProcessor, "_update_prompt_logprobs", None)
    if getattr(stock, "keeps_arrays", False):
        return None
    if stock is None or list(inspect.signature(stock).parameters) != ["self", "prompt_logprobs_tensors"]:
        return "LogprobsProcessor._update_prompt_logprobs has another signature"
    if LogprobsTensors._fields[:2] != ("logprob_token_ids", "logprobs"):
        return f"LogprobsTensors has other fields: {LogprobsTensors._fields}"
    caller = inspect.getsource(LogprobsProcessor.update_from_output)
    if "self._update_prompt_logprobs(output.new_prompt_logprobs_tensors)" not in caller:
        return "LogprobsProcessor does not use new_prompt_logprobs_tensors"

    @functools.wraps(stock)
    def keep_arrays(self: Any, prompt_logprobs_tensors: LogprobsTensors) -> None:
        # Requests that are not ours (with text, or flat) go the way they always went.
        if self.tokenizer is not None or isinstance(self.prompt_logprobs, FlatLogprobs):
            stock(self, prompt_logprobs_tensors)
        else:
            self.prompt_logprobs.append(prompt_logprobs_tensors)

    patched: Any = LogprobsProcessor
    patched._update_prompt_logprobs = keep_arrays
    patched._update_prompt_logprobs.keeps_arrays = True
    return None


def _as_arrays(prompt_logprobs: Any, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """ids and logprobs [rows, k+1] out of a reply: chunks of arrays, or vLLM's flat lists."""
    if isinstance(prompt_logprobs, FlatLogprobs):
        ids = np.array(prompt_logprobs.token_ids, np.int32).reshape(-1, k + 1)
        return ids, np.array(prompt_logprobs.logprobs, np.float32).reshape(-1, k + 1)
    # None stands for the first token, which nothing predicts.
    chunks = [chunk for chunk in prompt_logprobs or [] if chunk is not None]
    if not chunks or not all(isinstance(chunk, LogprobsTensors) for chunk in chunks):
        return np.empty((0, k + 1), np.int32), np.empty((0, k + 1), np.float32)
    ids = np.concatenate([np.asarray(chunk.logprob_token_ids, np.int32) for chunk in chunks])
    return ids, np.concatenate([np.asarray(chunk.logprobs, np.float32) for chunk in chunks])


def _run_engine_core(writer: Connection, *args: Any, **kwargs: Any) -> None:
    """In place of vLLM's own target of the engine core's process."""
    with on_leash(writer):
        EngineCoreProc.run_engine_core(*args, **kwargs)


def _without_main(name: str) -> dict[str, Any]:
    """What a spawned process begins with, less this one's main module.

    The core needs nothing of it, and vllm-cpu does not start where it has loaded llvmlite (numba).
    """
    data = _preparation_data(name)
    return {key: value for key, value in data.items() if not key.startswith("init_main_from_")}
