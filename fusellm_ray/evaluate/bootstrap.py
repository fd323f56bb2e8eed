"""How far a difference in bits per byte is due to the documents that happen to be held out.

    per document: nats and bytes of each model → resampled documents → differences → interval

Documents are drawn with replacement, domain by domain, and the same draws serve every model. So a difference of
two models is *paired*: that a document is hard for all of them cancels out. A model's figure on a draw is the ratio
estimator itself, summed nats over summed bytes, not a mean of documents' ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusellm_ray.perplexity import DocumentScore

LEVEL = 0.95
"""Coverage of the intervals."""
LEAST_DOCUMENTS = 8
"""Of a domain with fewer, no interval is given: so few draws say nothing."""
NUM_RESAMPLES = 2000
_MOST_DRAWS = 1 << 22
"""Numbers held at once."""

MEAN = "mean"
"""Name of the mean over domains, each with the same weight."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference in bits per byte, negative where the first model is better, and where it lies."""

    difference: float
    low: float
    """NaN, like `high`, where there are too few documents to tell."""
    high: float

    @property
    def is_decided(self) -> bool:
        """The interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def resample_ratios(
    nats: ArrayLike, num_bytes: ArrayLike, *, num_resamples: int, seed: int | Sequence[int]
) -> NDArray[np.float64]:
    """Bits per byte of M models on `num_resamples` draws of D documents; each draw is the same for all.

    Args:
        nats, num_bytes: [M, D]; bytes may differ where a model does not predict a document's first token.
        seed: the same one gives the same draws.

    Returns:
        [M, num_resamples]

    Example:
        Two models: difference = ratios[0] - ratios[1]; np.quantile(difference, [0.025, 0.975])
    """
    nats, num_bytes = np.asarray(nats, float), np.asarray(num_bytes, float)
    num_documents = nats.shape[1]
    rng = np.random.default_rng(seed)
    share = np.full(num_documents, 1 / num_documents)
    at_once = max(1, _MOST_DRAWS // num_documents)
    parts = []
    for start in range(0, num_resamples, at_once):
        times_drawn = rng.multinomial(num_documents, share, size=min(at_once, num_resamples - start))
        parts.append((nats @ times_drawn.T) / (num_bytes @ times_drawn.T))
    return np.concatenate(parts, axis=1) / math.log(2)


class PairedBootstrap:
    """Intervals of differences between models that were scored on the same documents.

    Args:
        models: model → its documents' scores, in the same order for every model.
        num_resamples: draws.
        seed: of the draws.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[DocumentScore]],
        *,
        num_resamples: int = NUM_RESAMPLES,
        seed: int = 0,
    ) -> None:
        self.num_resamples, self.seed = num_resamples, seed
        self._index = {model: i for i, model in enumerate(models)}
        self._ratios: dict[str, NDArray[np.float64]] = {}
        """Domain → [M, num_resamples]; no entry for domains of too few documents."""
        self._estimates: dict[str, NDArray[np.float64]] = {}
        """Domain → [M]."""
        lists = list(models.values())
        names = [[(d.domain, d.name) for d in documents] for documents in lists]
        assert all(other == names[0] for other in names), "models scored on different documents"
        # A document that some model cannot score at all pairs with nothing.
        kept = [i for i in range(len(names[0])) if all(documents[i].bytes for documents in lists)]
        for number, domain in enumerate(dict.fromkeys(names[0][i][0] for i in kept)):
            own = [i for i in kept if names[0][i][0] == domain]
            nats = np.array([[documents[i].nats for i in own] for documents in lists])
            num_bytes = np.array([[documents[i].bytes for i in own] for documents in lists])
            self._estimates[domain] = nats.sum(1) / num_bytes.sum(1) / math.log(2)
            if len(own) >= LEAST_DOCUMENTS:
                self._ratios[domain] = resample_ratios(
                    nats, num_bytes, num_resamples=num_resamples, seed=(seed, number)
                )

    def difference(self, model: str, against: str) -> dict[str, Interval]:
        """Domain → how much `model` differs from `against`; `MEAN` is the last key."""
        a, b = self._index[model], self._index[against]
        estimates = {domain: float(values[a] - values[b]) for domain, values in self._estimates.items()}
        ratios = {domain: values[a] - values[b] for domain, values in self._ratios.items()}
        estimates[MEAN] = math.fsum(estimates.values()) / len(estimates)
        if len(ratios) == len(self._estimates):
            ratios[MEAN] = np.mean(list(ratios.values()), axis=0)
        tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
        intervals = {}
        for domain, estimate in estimates.items():
            low, high = np.quantile(ratios[domain], tails) if domain in ratios else (math.nan, math.nan)
            intervals[domain] = Interval(estimate, float(low), float(high))
        return intervals
