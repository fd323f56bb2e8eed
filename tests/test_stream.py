"""The stream on a real Ray: real engines in real processes, some of which are killed."""

from __future__ import annotations

import asyncio
import itertools
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
from fusellm_ray.config import Config, StreamConfig
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import AlignmentError, ClusterError, ConfigError, FrameError, TeacherLostError
from fusellm_ray.observe.progress import Display
from fusellm_ray.stream import client
from fusellm_ray.stream.address import TeacherAddress
from fusellm_ray.stream.client import TeacherStream
from fusellm_ray.stream.frame import decode_frame, encode_request
from fusellm_ray.teachers.report import Description
from fusellm_ray.teachers.scoring import TeacherScorer
from fusellm_ray.teachers.service import start_pools, stop_pools, wait_ready
from fusellm_ray.teachers.supervisor import PoolSupervisor
from tests.models import tiny_model
from tests.tokenizers import VOCAB_SIZE, build, training_text

PATIENCE_S = 300.0
"""For processes to start: seconds on an idle machine, minutes on a busy one."""
TEXT = "".join(training_text())
TEACHER = {"top_k": 8, "resources": {"num_cpus": 0.5}, "cache_bytes": 0}
"""Nothing is kept: these tests ask for the same text again, and for what it costs to score it."""
Joined = list[tuple[list[Segment], list[list[Aligned] | None]]]


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
            "teachers": [{**TEACHER, **teacher} for teacher in teachers],
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
        self.teachers = {t.name: t for t in config.active_teachers}

    def __enter__(self) -> Service:
        self.pools = start_pools(self.config)
        try:
            self.descriptions = wait_ready(self.pools, PATIENCE_S)
        except BaseException:
            stop_pools(self.pools)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop_pools(self.pools)

    def stream(self, *names: str, fingerprint: str | None = None, **config: Any) -> TeacherStream:
        """From some of the teachers, all by default."""
        addresses = [
            TeacherAddress(
                name=name,
                fingerprint=fingerprint or self.descriptions[name].fingerprint,
                top_k=self.teachers[name].top_k,
                pool=self.pools[name],
            )
            for name in names or self.teachers
        ]
        return TeacherStream(addresses, StreamConfig(**{"deadline_s": PATIENCE_S, **config}), VOCAB_SIZE)

    def replicas(self, teacher: str) -> list[Description]:
        table = ray.get(self.pools[teacher].table.remote(teacher))
        return ray.get([handle.describe.remote() for handle in table.handles.values()])

    def alone(self, asked: list[list[Segment]], *names: str) -> list[list[list[Aligned]]]:
        """What teachers answer to each batch in this process, without Ray: the reference."""

        async def answers(name: str) -> list[list[Aligned]]:
            scorer = TeacherScorer(self.teachers[name], self.config.target, self.config.alignment)
            parts = [
                decode_frame(
                    await scorer.answer(encode_request(batch)),
                    teacher=name,
                    fingerprint=scorer.fingerprint,
                    vocab_size=VOCAB_SIZE,
                    top_k=self.teachers[name].top_k,
                    num_positions=[s.num_positions for s in batch],
                )
                for batch in asked
            ]
            await scorer.stop()
            return parts

        by_teacher = [asyncio.run(answers(name)) for name in names or self.teachers]
        return [list(parts) for parts in zip(*by_teacher, strict=True)]


@pytest.fixture(scope="module")
def real(models: dict[str, Path]) -> Iterator[Service]:
    """Two transformers teachers with two tokenizers, neither of them the target's."""
    config = run_config(
        models,
        {"name": "sp", "model": str(models["sp"]), "replicas": {"min": 2, "max": 2}},
        {"name": "uni", "model": str(models["uni"])},
    )
    with Service(config) as service:
        yield service


@pytest.fixture(scope="module")
def costed(models: dict[str, Path]) -> Iterator[Service]:
    """Teachers without weights: an instant one, one that needs 2 s for its self-test and 12 s for a batch."""
    config = run_config(
        models,
        simulated(models, replicas=2),
        simulated(models, "slow", tokens_per_s=40),
        deadline_s=12,  # the pool restarts what hangs for half of it
    )
    with Service(config) as service:
        yield service


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


def assert_same_bits(seen: Joined, asked: list[list[Segment]], wanted: list[list[list[Aligned]]]) -> None:
    assert [segments for segments, _ in seen] == asked
    assert all(a is b for (a, _), b in zip(seen, asked, strict=True))
    for (_, by_teacher), wanted_by_teacher in zip(seen, wanted, strict=True):
        for parts, wanted_parts in zip(by_teacher, wanted_by_teacher, strict=True):
            assert parts is not None
            for part, want in zip(parts, wanted_parts, strict=True):
                for name in ("ids", "logprobs", "gold", "residual", "valid"):
                    np.testing.assert_array_equal(getattr(part, name), getattr(want, name))


# ---------------------------------------------------------------------------------------- streaming


def test_two_teachers_with_other_tokenizers_answer_as_they_do_alone(
    real: Service, models: dict[str, Path]
) -> None:
    asked = batches(models, 12)
    stream = real.stream(in_flight_tokens=2000)
    seen = list(stream.join(asked))
    assert_same_bits(seen, asked, real.alone(asked))
    coverage = np.concatenate([part.valid for _, parts in seen for part in parts[0]]).mean()
    assert coverage > 0.95
    positions = sum(s.num_positions for batch in asked for s in batch)
    for traffic in stream.stats().values():
        assert (traffic.answers, traffic.positions, traffic.retries) == (12, positions, 0)
        assert 0 < traffic.answer_bytes < positions * 60
    assert stream.wait_s > 0
    stats = ray.get(real.pools["uni"].stats.remote("uni"))[0]
    assert stats.positions == positions
    assert stats.segments == 36
    assert stats.coverage == pytest.approx(coverage, abs=0.05)
    assert stats.fidelity == pytest.approx(1.0, abs=0.05)


def test_killed_replicas_change_nothing_in_what_is_joined(real: Service, models: dict[str, Path]) -> None:
    asked = batches(models, 30)
    victims = [real.replicas("sp")[0].pid, real.replicas("uni")[0].pid]
    stream = real.stream(in_flight_tokens=2000)
    seen: Joined = []
    for number, joined in enumerate(stream.join(asked)):
        seen.append(joined)
        if number in (4, 9):
            os.kill(victims.pop(), signal.SIGKILL)
    assert_same_bits(seen, asked, real.alone(asked))
    assert stream.stats()["uni"].retries > 0
    wait_ready(real.pools, PATIENCE_S)


def test_a_killed_supervisor_comes_back_with_replicas(models: dict[str, Path]) -> None:
    asked = batches(models, 10)
    with Service(run_config(models, simulated(models))) as service:
        seen: Joined = []
        for number, joined in enumerate(service.stream(in_flight_tokens=1000).join(asked)):
            seen.append(joined)
            if number == 2:
                ray.kill(service.pools["sim"], no_restart=False)
        assert_same_bits(seen, asked, service.alone(asked))


def test_requests_that_fail_are_sent_again(costed: Service, models: dict[str, Path]) -> None:
    asked = batches(models, 20)
    with Service(run_config(models, simulated(models, failure_rate=0.3))) as service:
        stream = service.stream()
        seen = list(stream.join(asked))
    assert_same_bits(seen, asked, costed.alone(asked, "sim"))
    assert stream.stats()["sim"].retries > 0


def test_no_more_is_read_ahead_than_credits_allow(costed: Service, models: dict[str, Path]) -> None:
    asked = batches(models, 12, segments=1)
    tokens = [sum(len(s.ids) for s in batch) for batch in asked]
    limit = 3 * max(tokens)
    read = 0

    def counted() -> Iterator[list[Segment]]:
        nonlocal read
        for batch in asked:
            read += 1
            yield batch

    for number, _ in enumerate(costed.stream("sim", in_flight_tokens=limit).join(counted())):
        in_flight = sum(tokens[number + 1 : read])
        assert in_flight <= limit + max(tokens)  # the size of a batch is known once it is read
        assert in_flight > 0 or number == len(asked) - 1
    assert read == len(asked)


def test_an_abandoned_stream_leaves_its_teachers_to_the_next(
    costed: Service, models: dict[str, Path]
) -> None:
    asked = batches(models, 6)
    stream = costed.stream("sim")
    first = next(stream.join(asked))
    assert first[0] is asked[0]
    assert_same_bits(list(stream.join(asked)), asked, costed.alone(asked, "sim"))


# ---------------------------------------------------------------------------------------- deadlines


def test_time_away_from_the_stream_does_not_count(costed: Service, models: dict[str, Path]) -> None:
    for _ in costed.stream("slow", deadline_s=6, in_flight_tokens=1).join(batches(models, 2, 1, size=150)):
        time.sleep(7)


def test_time_away_from_the_stream_does_not_hide_a_straggler(
    costed: Service, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_SLOW", 20.0)
    asked = batches(models, 8)
    stream = costed.stream("sim", in_flight_tokens=1)
    frozen, _ = costed.replicas("sim")
    seen: Joined = []
    waited_s = 0.0
    try:
        for number, joined in enumerate(stream.join(asked)):
            seen.append(joined)
            if number < 4:
                time.sleep(1.5)  # 20 times that is no usual time for an answer
            elif number == 4:
                waited_s = stream.wait_s
                os.kill(frozen.pid, signal.SIGSTOP)
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    assert stream.stats()["sim"].retries > 0
    assert stream.wait_s - waited_s < 5
    assert_same_bits(seen, asked, costed.alone(asked, "sim"))
    wait_ready(costed.pools, PATIENCE_S)


def test_a_teacher_that_hangs_is_lost_within_its_deadline(costed: Service, models: dict[str, Path]) -> None:
    started = time.monotonic()
    with pytest.raises(TeacherLostError, match=r"teacher slow: no answer to batch 0 for 4\.\d s"):
        list(costed.stream("sim", "slow", deadline_s=4).join(batches(models, 2)))
    assert 4 <= time.monotonic() - started < 8


def test_a_stopped_process_is_replaced_and_its_requests_answered(
    costed: Service, models: dict[str, Path]
) -> None:
    asked = batches(models, 8)
    stream = costed.stream("sim", deadline_s=40)
    frozen, _ = costed.replicas("sim")
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        seen = list(stream.join(asked))
        assert stream.stats()["sim"].retries > 0
        give_up = time.monotonic() + PATIENCE_S
        while is_alive(frozen.pid):
            assert time.monotonic() < give_up, "the frozen replica was not replaced"
            time.sleep(0.2)
        wait_ready(costed.pools, PATIENCE_S)
    finally:
        if is_alive(frozen.pid):
            os.kill(frozen.pid, signal.SIGKILL)
    assert_same_bits(seen, asked, costed.alone(asked, "sim"))


# ---------------------------------------------------------------------------------------- lost teachers


def test_under_fail_a_lost_teacher_ends_the_stream_before_its_deadline(
    costed: Service, models: dict[str, Path]
) -> None:
    stream = costed.stream("sim", "slow", on_teacher_loss="fail", loss_deadline_s=2)
    with pytest.raises(
        TeacherLostError, match=r"teacher slow: no answer to batch 0 .*stream\.loss_deadline_s"
    ):
        list(stream.join(batches(models, 2)))


def test_under_drop_batches_go_on_without_a_frozen_teacher_until_it_is_back(
    real: Service, models: dict[str, Path]
) -> None:
    asked = batches(models, 6)
    wanted = real.alone(asked)
    stream = real.stream(on_teacher_loss="drop", loss_deadline_s=8, in_flight_tokens=2000)
    joined = stream.join(itertools.cycle(asked))
    (replica,) = real.replicas("uni")
    (handle,) = ray.get(real.pools["uni"].table.remote("uni")).handles.values()
    give_up = time.monotonic() + PATIENCE_S
    seen = [next(joined)]
    # Of two open batches the later may be answered first: let all be.
    while ray.get(handle.heartbeat.remote()).queued_tokens:
        time.sleep(0.05)
    os.kill(replica.pid, signal.SIGSTOP)
    try:
        while seen[-1][1][1] is not None:
            seen.append(next(joined))
        waited_s = stream.wait_s
        first_lost = len(seen) - 1
        for _ in range(12):
            seen.append(next(joined))
            assert seen[-1][1][1] is None
        assert stream.wait_s - waited_s < 32  # waiting 8 s for each would be 96
    finally:
        os.kill(replica.pid, signal.SIGCONT)
    while seen[-1][1][1] is None:
        assert time.monotonic() < give_up, "the teacher was not taken back"
        seen.append(next(joined))
    dropped = [parts[1] is None for _, parts in seen]
    assert dropped == [first_lost <= i < len(seen) - 1 for i in range(len(seen))]
    positions = sum(s.num_positions for segments, parts in seen if parts[1] is None for s in segments)
    joined.close()
    assert stream.stats()["uni"].dropped >= positions  # and those read ahead
    for number, (segments, parts) in enumerate(seen):
        kept = [k for k, part in enumerate(parts) if part is not None]
        assert_same_bits(
            [(segments, [parts[k] for k in kept])],
            [asked[number % 6]],
            [[wanted[number % 6][k] for k in kept]],
        )


# ---------------------------------------------------------------------------------------- scaling


def test_a_slow_teacher_grows_while_ranks_wait_and_shrinks_after(models: dict[str, Path]) -> None:
    config = run_config(models, {**simulated(models, tokens_per_s=3000), "replicas": {"min": 1, "max": 2}})
    (teacher,) = config.teachers
    pool = ray.remote(PoolSupervisor).remote([teacher], config.target, config.alignment, 60, scale_s=0.5)
    pools = {"sim": pool}
    try:
        (description,) = wait_ready(pools, PATIENCE_S).values()
        address = TeacherAddress("sim", description.fingerprint, teacher.top_k, pool)
        asked = batches(models, 20)
        seen: Joined = []
        grown = False
        while not grown:
            stream = TeacherStream([address], StreamConfig(in_flight_tokens=4000), VOCAB_SIZE)
            seen = list(stream.join(asked))
            grown = len(ray.get(pool.table.remote("sim")).handles) == 2
        (up,) = ray.get(pool.status.remote("sim")).decisions
        assert up.replicas == 2
        assert "ranks wait" in up.reason

        pids = [
            d.pid
            for d in ray.get(
                [h.describe.remote() for h in ray.get(pool.table.remote("sim")).handles.values()]
            )
        ]
        give_up = time.monotonic() + PATIENCE_S
        while all(map(is_alive, pids)):
            assert time.monotonic() < give_up, "no replica was drained"
            time.sleep(0.5)
        assert len(ray.get(pool.table.remote("sim")).handles) == 1
        seen = list(TeacherStream([address], StreamConfig(), VOCAB_SIZE).join(asked))
    finally:
        stop_pools(pools)
    with_one = run_config(models, simulated(models))
    assert_same_bits(seen, asked, Service(with_one).alone(asked))


# ---------------------------------------------------------------------------------------- refusals


def test_an_answer_of_another_fingerprint_is_refused(costed: Service, models: dict[str, Path]) -> None:
    stream = costed.stream("sim", fingerprint="0" * 64)
    with pytest.raises(
        FrameError, match=r"teacher sim, batch 0, replica \d: frame fingerprint: '[0-9a-f]{64}'"
    ):
        list(stream.join(batches(models, 1)))


def test_a_replica_that_restarts_with_another_tokenizer_is_refused(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    folder = build("llama", tmp_path / "changing")
    teacher = {"name": "changing", "model": str(folder), "engine": {"type": "simulated"}}
    with Service(run_config(models, teacher)) as service:
        (replica,) = service.replicas("changing")
        build("unigram", folder)
        joined = service.stream(in_flight_tokens=1).join(batches(models, 6))
        next(joined)
        os.kill(replica.pid, signal.SIGKILL)
        with pytest.raises(AlignmentError, match=f"the first replica, on {replica.node}, with"):
            list(joined)


def test_more_candidates_than_tokens_are_refused_before_anything_is_scored(models: dict[str, Path]) -> None:
    config = run_config(models, {**simulated(models), "top_k": VOCAB_SIZE + 1})
    with pytest.raises(ConfigError, match=f"top_k={VOCAB_SIZE + 1} exceeds the vocabulary"), Service(config):
        pass


class Said(Display):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.states: list[dict[str, str]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def teachers(self, states: dict[str, str]) -> None:
        self.states.append(states)


def test_what_the_cluster_lacks_is_said_instead_of_waited_for(models: dict[str, Path]) -> None:
    pools = start_pools(
        run_config(models, {**simulated(models), "resources": {"num_cpus": 0.5, "num_gpus": 3}})
    )
    display = Said()
    try:
        ray.get(pools["sim"].status.remote("sim"))
        with pytest.raises(ClusterError, match=r"each asks for CPU 0\.5, GPU 3\. The cluster has CPU 8"):
            wait_ready(pools, 1, display, slow_s=0.2)
    finally:
        stop_pools(pools)
    waiting = "0/1 replicas ready, each asks for CPU 0.5, GPU 3"
    assert {"sim": waiting} in display.states
    (note,) = display.notes
    assert note.startswith(f"teachers are not up yet (teacher sim: {waiting}). The cluster has CPU 8")
    assert "free: " in note
    assert note.endswith("Giving up after 1 s (run.start_timeout_s)")


def test_stopping_leaves_no_process(models: dict[str, Path]) -> None:
    with Service(run_config(models, simulated(models))) as service:
        (replica,) = service.replicas("sim")
        assert is_alive(replica.pid)
    give_up = time.monotonic() + 10
    while is_alive(replica.pid):
        assert time.monotonic() < give_up
        time.sleep(0.1)
