"""Every error a user can cause or meet, under one root.

A message says where, what was seen, what the limit is, and what to do about it. All are plain
`Exception` subclasses built from one string, so they survive pickling through Ray unchanged.
"""


class FuseLLMError(Exception):
    """Root of all errors raised on purpose by this package."""


class ConfigError(FuseLLMError, ValueError):
    """A configuration that cannot work: unknown keys, values out of range, parts that do not fit together."""


class CorpusError(FuseLLMError, ValueError):
    """A corpus that is missing, empty, undecodable, or lacks a field."""


class TokenizerError(FuseLLMError, ValueError):
    """A tokenizer that does not exist, or that cannot say which bytes each of its tokens covers."""


class ModelError(FuseLLMError, ValueError):
    """A model that cannot be loaded, or whose structure the objective cannot use."""


class AlignmentError(FuseLLMError, ValueError):
    """Positions, offsets or shapes of a teacher and the target that do not belong together."""


class FrameError(FuseLLMError, ValueError):
    """Bytes received that are not the frame that was asked for."""


class EngineError(FuseLLMError, RuntimeError):
    """A teacher's engine answered wrongly: non-finite numbers, wrong shapes, wrong tokens."""


class TeacherLostError(FuseLLMError, RuntimeError):
    """A teacher did not answer within its deadline, and the policy is not to go on without it."""


class ClusterError(FuseLLMError, RuntimeError):
    """The cluster cannot give what the run asks for."""


class CheckpointError(FuseLLMError, RuntimeError):
    """A checkpoint that is absent, incomplete, or belongs to another run."""
