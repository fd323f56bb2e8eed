"""A replica's latest answers, in memory: the same segment asked again is not scored again.

runs of a sweep, a resumed run ─→ segments ─┬─ answered lately ──→ from here
                                            ├─ being scored now ─→ waited for
                                            └─ new ──────────────→ scored, kept
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.errors import EngineError

_ENTRY_BYTES = 1024
"""Of Python objects around an answer's arrays, about."""


class AnswerCache:
    """Answers by all that they depend on in a segment, the least recently asked go first. For one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Aligned] = OrderedDict()
        self._scoring: dict[bytes, asyncio.Future[Aligned]] = {}
        self.num_bytes = 0
        self.hits = 0
        """Segments that were not scored for being asked, because their answer was here or on its way."""
        self.misses = 0

    async def answers(
        self, segments: Sequence[Segment], score: Callable[[Sequence[Segment]], Awaitable[list[Aligned]]]
    ) -> list[Aligned]:
        """The answer to each segment; `score` is asked for those that nobody has asked for lately.

        Raises:
            Exception: whatever `score` raised, for whoever asked first.
        """
        if not self._max_bytes:
            return await score(segments)
        keys = [_key(segment) for segment in segments]
        found: dict[bytes, Aligned] = {}
        awaited: dict[bytes, asyncio.Future[Aligned]] = {}
        new: dict[bytes, Segment] = {}
        for key, segment in zip(keys, segments, strict=True):
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
            elif key in self._scoring:
                awaited[key] = self._scoring[key]
            else:
                new[key] = segment
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        if new:
            found |= await self._score(new, score)
        for key, answer in awaited.items():
            found[key] = await asyncio.shield(answer)  # who gives up here does not cancel it for others
        return [found[key] for key in keys]

    async def _score(
        self, new: dict[bytes, Segment], score: Callable[[Sequence[Segment]], Awaitable[list[Aligned]]]
    ) -> dict[bytes, Aligned]:
        loop = asyncio.get_running_loop()
        futures: dict[bytes, asyncio.Future[Aligned]] = {key: loop.create_future() for key in new}
        self._scoring |= futures
        try:
            answers = dict(zip(new, await score(list(new.values())), strict=True))
        except BaseException as error:
            reason = error if isinstance(error, Exception) else EngineError("whoever asked first gave up")
            for future in futures.values():
                future.set_exception(reason)
                future.exception()  # seen: there may be nobody else who waits for it
            raise
        finally:
            for key in new:
                del self._scoring[key]
        for key, answer in answers.items():
            futures[key].set_result(answer)
            self._keep(key, answer)
        return answers

    def _keep(self, key: bytes, answer: Aligned) -> None:
        self._kept[key] = answer
        self.num_bytes += _size(answer)
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= _size(self._kept.popitem(last=False)[1])


def _key(segment: Segment) -> bytes:
    """Of a segment's content; its domain and its document's name change no answer."""
    digest = hashlib.blake2b(segment.text, digest_size=16)
    digest.update(b"\x01" if segment.ends_document else b"\x00")
    digest.update(segment.ids.tobytes())
    digest.update(segment.ends.tobytes())
    return digest.digest()


def _size(answer: Aligned) -> int:
    arrays = (answer.ids, answer.logprobs, answer.gold, answer.residual, answer.valid)
    return _ENTRY_BYTES + sum(array.nbytes for array in arrays)
