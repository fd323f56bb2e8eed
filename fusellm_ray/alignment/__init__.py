"""A teacher's distributions brought to the target's positions and vocabulary: pure numpy and numba."""

from fusellm_ray.alignment.project import Aligned, Aligner
from fusellm_ray.alignment.vocabulary import Vocabulary

__all__ = ["Aligned", "Aligner", "Vocabulary"]
