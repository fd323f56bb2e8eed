"""The stream on a real Ray: real engines in real processes, some of which are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.config import Config
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import AlignmentError, ClusterError, ConfigError, FrameError, TeacherLostError
from fusellm_ray.stream.client import TeacherAddress, TeacherStream
from fusellm_ray.stream.frame import decode_frame, encode_request
from fusellm_ray.teachers.pool import start_pools, stop_pools, wait_ready
from fusellm_ray.teachers.replica import Description, TeacherReplica
from tests.models import tiny_model
from tests.tokenizers import VOCAB_SIZE, build, training_text

TEXT = "".join(training_text())
Joined = list[tuple[list[Segment], list[list[Aligned]]]]


@pytest.fixture(scope="module")
def models(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tiny models, each with its tokenizer in its folder."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for seed, (name, architecture, kind) in enumerate(
        [("target", "llama", "bytelevel"), ("sp", "llama", "llama"), ("uni", "gpt_neox", "unigram")]
    ):
        made[name] = tiny_model(architecture, VOCAB_SIZE, root / name, seed=seed)
        build(kind, made[name])  # type: ignore[arg-type]
    return made


def run_config(models: dict[str, Path], *teachers: dict[str, Any], **stream: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "target": {"model": str(models["target"])},
            "teachers": [{"top_k": 8, "resources": {"num_cpus": 0.5}, **teacher} for teacher in teachers],
            "corpus": {"sources": [{"name": "none", "path": "none"}]},
            "training": {"steps": 1},
            "stream": stream,
        }
    )


def simulated(models: dict[str, Path], name: str = "sim", replicas: int = 1, **engine: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": str(models["sp"]),
        "engine": {"type": "simulated", **engine},
        "replicas": {"min": replicas, "max": replicas},
    }


class Service:
    """The pools of a config, up while the block lasts."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __enter__(self) -> Service:
        self.pools = start_pools(self.config)
        try:
            self.descriptions = wait_ready(self.pools, 120)
        except BaseException:
            stop_pools(self.pools)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop_pools(self.pools)

    def addresses(self, **changes: Any) -> list[TeacherAddress]:
        return [
            TeacherAddress(
                **{
                    "name": t.name,
                    "fingerprint": self.descriptions[t.name].fingerprint,
                    "top_k": t.top_k,
                    "pool": self.pools[t.name],
                    **changes,
                }
            )
            for t in self.config.active_teachers
        ]

    def stream(self, **changes: Any) -> TeacherStream:
        return TeacherStream(self.addresses(**changes), self.config.stream, VOCAB_SIZE)

    def replicas(self, teacher: str) -> list[Description]:
        table = ray.get(self.pools[teacher].table.remote())
        return ray.get([handle.describe.remote() for handle in table.handles.values()])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def batches(models: dict[str, Path], count: int, segments: int = 3, size: int = 400) -> list[list[Segment]]:
    """Consecutive text of the test corpus; some segments exceed a teacher's context of 128."""
    target = ByteTokenizer.load(str(models["target"]), vocab_size=VOCAB_SIZE)
    made, start = [], 0
    for number in range(count):
        batch = []
        for i in range(segments):
            length = 1 if (number, i) == (1, 1) else size + 37 * i
            text = TEXT[start : start + length]
            start += length
            tokens = target.sequence(text, i == 1)
            batch.append(
                Segment(
                    text=text.encode(),
                    ids=tokens.ids,
                    ends=tokens.ends,
                    ends_document=i == 1,
                    domain="prose",
                    document=f"{number}.{i}",
                )
            )
        made.append(batch)
    return made


def in_this_process(config: Config, asked: list[list[Segment]]) -> list[list[list[Aligned]]]:
    """What each teacher answers to each batch, without Ray: the reference."""

    async def answers(teacher: Any) -> list[list[Aligned]]:
        replica = TeacherReplica(teacher, config.target, config.alignment)
        description = await replica.describe()
        parts = [
            decode_frame(
                await replica.score(encode_request(batch)),
                teacher=teacher.name,
                fingerprint=description.fingerprint,
                vocab_size=VOCAB_SIZE,
                num_positions=[s.num_positions for s in batch],
            )
            for batch in asked
        ]
        await replica.stop()
        return parts

    by_teacher = [asyncio.run(answers(teacher)) for teacher in config.active_teachers]
    return [list(parts) for parts in zip(*by_teacher, strict=True)]


def assert_same_bits(seen: Joined, asked: list[list[Segment]], wanted: list[list[list[Aligned]]]) -> None:
    assert [segments for segments, _ in seen] == asked
    assert all(a is b for (a, _), b in zip(seen, asked, strict=True))
    for (_, by_teacher), wanted_by_teacher in zip(seen, wanted, strict=True):
        for parts, wanted_parts in zip(by_teacher, wanted_by_teacher, strict=True):
            for part, want in zip(parts, wanted_parts, strict=True):
                for name in ("ids", "logprobs", "gold", "residual", "valid"):
                    np.testing.assert_array_equal(getattr(part, name), getattr(want, name))


@pytest.fixture(scope="module")
def two_real_teachers(models: dict[str, Path]) -> Iterator[Service]:
    pair = {"replicas": {"min": 2, "max": 2}}
    config = run_config(
        models,
        {"name": "sp", "model": str(models["sp"]), **pair},
        {"name": "uni", "model": str(models["uni"]), **pair},
        in_flight_tokens=2000,
        deadline_s=60,
    )
    with Service(config) as service:
        yield service


# ---------------------------------------------------------------------------------------- streaming


def test_two_teachers_with_other_tokenizers_answer_as_they_do_alone(
    two_real_teachers: Service, models: dict[str, Path]
) -> None:
    asked = batches(models, 12)
    stream = two_real_teachers.stream()
    seen = list(stream.join(asked))
    assert_same_bits(seen, asked, in_this_process(two_real_teachers.config, asked))
    coverage = np.concatenate([part.valid for _, parts in seen for part in parts[0]]).mean()
    assert coverage > 0.95
    positions = sum(s.num_positions for batch in asked for s in batch)
    for traffic in stream.stats().values():
        assert (traffic.answers, traffic.positions, traffic.retries) == (12, positions, 0)
        assert 0 < traffic.answer_bytes < positions * 60
    assert stream.wait_s > 0


def test_killed_replicas_change_nothing_in_what_is_joined(
    two_real_teachers: Service, models: dict[str, Path]
) -> None:
    asked = batches(models, 30)
    wanted = in_this_process(two_real_teachers.config, asked)
    victims = [two_real_teachers.replicas("sp")[0].pid, two_real_teachers.replicas("uni")[1].pid]
    stream = two_real_teachers.stream()
    seen: Joined = []
    for number, joined in enumerate(stream.join(asked)):
        seen.append(joined)
        if number in (4, 9):
            os.kill(victims.pop(), signal.SIGKILL)
    assert_same_bits(seen, asked, wanted)
    wait_ready(two_real_teachers.pools, 60)


def test_the_loss_of_all_replicas_at_once_is_waited_out(
    two_real_teachers: Service, models: dict[str, Path]
) -> None:
    asked = batches(models, 10)
    stream = two_real_teachers.stream()
    seen: Joined = []
    for number, joined in enumerate(stream.join(asked)):
        seen.append(joined)
        if number == 2:
            for replica in two_real_teachers.replicas("sp"):
                os.kill(replica.pid, signal.SIGKILL)
    assert_same_bits(seen, asked, in_this_process(two_real_teachers.config, asked))
    assert stream.stats()["sp"].retries > 0
    wait_ready(two_real_teachers.pools, 60)


def test_a_killed_pool_comes_back_with_replicas(models: dict[str, Path]) -> None:
    asked = batches(models, 10)
    with Service(run_config(models, simulated(models), in_flight_tokens=1000, deadline_s=60)) as service:
        seen: Joined = []
        for number, joined in enumerate(service.stream().join(asked)):
            seen.append(joined)
            if number == 2:
                ray.kill(service.pools["sim"], no_restart=False)
        assert_same_bits(seen, asked, in_this_process(service.config, asked))


def test_requests_that_fail_are_sent_again(models: dict[str, Path]) -> None:
    asked = batches(models, 20)
    config = run_config(models, simulated(models, failure_rate=0.3, replicas=2), deadline_s=60)
    with Service(config) as service:
        stream = service.stream()
        seen = list(stream.join(asked))
    config = run_config(models, simulated(models))
    assert_same_bits(seen, asked, in_this_process(config, asked))
    assert stream.stats()["sim"].retries > 0


def test_no_more_is_read_ahead_than_credits_allow(models: dict[str, Path]) -> None:
    asked = batches(models, 12, segments=1)
    tokens = [sum(len(s.ids) for s in batch) for batch in asked]
    limit = 3 * max(tokens)
    read = 0

    def counted() -> Iterator[list[Segment]]:
        nonlocal read
        for batch in asked:
            read += 1
            yield batch

    with Service(run_config(models, simulated(models), in_flight_tokens=limit)) as service:
        for number, _ in enumerate(service.stream().join(counted())):
            in_flight = sum(tokens[number + 1 : read])
            assert in_flight <= limit + max(tokens)
            assert in_flight > 0 or number == len(asked) - 1
        assert read == len(asked)


def test_an_abandoned_stream_leaves_its_teachers_to_the_next(models: dict[str, Path]) -> None:
    asked = batches(models, 6)
    with Service(run_config(models, simulated(models))) as service:
        stream = service.stream()
        first = next(stream.join(asked))
        again = list(stream.join(asked))
    assert_same_bits(again, asked, in_this_process(service.config, asked))
    assert first[0] is asked[0]


# ---------------------------------------------------------------------------------------- deadlines


def test_a_teacher_that_hangs_is_lost_within_its_deadline(models: dict[str, Path]) -> None:
    # The self-test takes it two seconds, a batch twelve.
    slow = simulated(models, "slow", tokens_per_s=40, replicas=2)
    with Service(run_config(models, slow, simulated(models), deadline_s=4)) as service:
        started = time.monotonic()
        with pytest.raises(TeacherLostError, match=r"teacher slow: no answer to batch 0 for 4\.\d s"):
            list(service.stream().join(batches(models, 2)))
        assert 4 <= time.monotonic() - started < 8


def test_a_stopped_process_is_replaced_and_its_requests_answered(models: dict[str, Path]) -> None:
    asked = batches(models, 8)
    with Service(run_config(models, simulated(models, replicas=2), deadline_s=12)) as service:
        stream = service.stream()
        frozen, _ = service.replicas("sim")
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            seen = list(stream.join(asked))
            assert stream.stats()["sim"].retries > 0
            give_up = time.monotonic() + 60
            while is_alive(frozen.pid):
                assert time.monotonic() < give_up, "the frozen replica was not replaced"
                time.sleep(0.2)
            wait_ready(service.pools, 60)
        finally:
            if is_alive(frozen.pid):
                os.kill(frozen.pid, signal.SIGKILL)
    assert_same_bits(seen, asked, in_this_process(service.config, asked))


def test_time_away_from_the_stream_does_not_count(models: dict[str, Path]) -> None:
    config = run_config(models, simulated(models, tokens_per_s=5000), deadline_s=2, in_flight_tokens=1)
    with Service(config) as service:
        for _ in service.stream().join(batches(models, 3, segments=1)):
            time.sleep(2.5)


# ---------------------------------------------------------------------------------------- refusals


def test_an_answer_of_another_fingerprint_is_refused(
    two_real_teachers: Service, models: dict[str, Path]
) -> None:
    stream = two_real_teachers.stream(fingerprint="0" * 64)
    with pytest.raises(
        FrameError, match=r"teacher \w+, batch 0, replica \d: frame fingerprint: '[0-9a-f]{64}'"
    ):
        list(stream.join(batches(models, 1)))


def test_a_replica_that_restarts_with_another_tokenizer_is_refused(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    folder = build("llama", tmp_path / "changing")
    teacher = {"name": "changing", "model": str(folder), "engine": {"type": "simulated"}}
    asked = batches(models, 6)
    with Service(run_config(models, teacher, in_flight_tokens=1, deadline_s=60)) as service:
        (replica,) = service.replicas("changing")
        build("unigram", folder)
        joined = service.stream().join(asked)
        next(joined)
        os.kill(replica.pid, signal.SIGKILL)
        with pytest.raises(AlignmentError, match=f"first replica announced {replica.fingerprint}"):
            list(joined)


def test_more_candidates_than_tokens_are_refused_before_anything_is_scored(models: dict[str, Path]) -> None:
    config = run_config(models, {**simulated(models), "top_k": VOCAB_SIZE + 1})
    with pytest.raises(ConfigError, match=f"top_k={VOCAB_SIZE + 1} exceeds the vocabulary"), Service(config):
        pass


def test_what_the_cluster_lacks_is_said_instead_of_waited_for(models: dict[str, Path]) -> None:
    config = run_config(models, {**simulated(models), "resources": {"num_gpus": 3}})
    pools = start_pools(config)
    said: list[dict[str, str]] = []
    try:
        with pytest.raises(
            ClusterError, match=r"teacher sim: 0/1 replicas ready.*asks for .*GPU 3.*cluster has"
        ):
            wait_ready(pools, 3, on_progress=said.append)
    finally:
        stop_pools(pools)
    assert said[0]["sim"].startswith("0/1 replicas ready")


def test_stopping_leaves_no_process(models: dict[str, Path]) -> None:
    with Service(run_config(models, simulated(models, replicas=2))) as service:
        pids = [replica.pid for replica in service.replicas("sim")]
        assert all(map(is_alive, pids))
    give_up = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < give_up
        time.sleep(0.1)
