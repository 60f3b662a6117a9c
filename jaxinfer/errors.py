"""Every error that jaxinfer raises on purpose.

    JaxInferError
    ├── TraceError              a forward can't be traced as asked (also a ValueError)
    ├── BatchMixingError        rows of a batch provably influence each other
    ├── NotCausalError          a later token can reach an earlier output, or no proof was found
    ├── PlanError               no layout fits, or a plan doesn't match the program or the devices
    ├── CheckpointError         a checkpoint is missing, damaged, hostile or not supported (also a ValueError)
    ├── RequestError            a request breaks a limit: empty, too long, ids out of range (also a ValueError)
    ├── QueueFullError          the engine's bounded queue has no room
    ├── DeadlineExceededError   a request's deadline passed (also a TimeoutError)
    ├── ReplicaError            a replica failed and nothing is left to run its requests
    ├── NonFiniteError          an output holds NaN or infinity, and the engine checks (also a FloatingPointError)
    └── EngineClosedError       the engine was closed (also a RuntimeError)

Each message says what failed, the limit or rule, what was got, and what to do.
"""

__all__ = [
    "BatchMixingError",
    "CheckpointError",
    "DeadlineExceededError",
    "EngineClosedError",
    "JaxInferError",
    "NonFiniteError",
    "NotCausalError",
    "PlanError",
    "QueueFullError",
    "ReplicaError",
    "RequestError",
    "TraceError",
]


class JaxInferError(Exception):
    """Base of all errors that jaxinfer raises on purpose."""


class TraceError(JaxInferError, ValueError):
    """A forward pass can't be traced as asked."""


class BatchMixingError(JaxInferError):
    """Rows of a batch influence each other, so requests must not share a batch."""


class NotCausalError(JaxInferError):
    """A later token can reach an earlier output, or no proof of the contrary was found."""


class PlanError(JaxInferError):
    """No layout fits, or a plan doesn't match its program or devices."""


class CheckpointError(JaxInferError, ValueError):
    """A checkpoint is missing, damaged, hostile or not supported."""


class RequestError(JaxInferError, ValueError):
    """A request breaks a limit: empty, too long, unknown option, token ids out of range."""


class QueueFullError(JaxInferError):
    """The engine's bounded queue has no room."""


class DeadlineExceededError(JaxInferError, TimeoutError):
    """A request's deadline passed before it finished."""


class ReplicaError(JaxInferError):
    """A replica failed, and nothing is left to run its requests."""


class NonFiniteError(JaxInferError, FloatingPointError):
    """An output holds NaN or infinity, in an engine that was told to check."""


class EngineClosedError(JaxInferError, RuntimeError):
    """The engine was closed, and takes no requests."""
