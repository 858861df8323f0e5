"""Every error labelfleet raises on purpose. This tree is the map:

    LabelfleetError                 exit 1
    ├── ConfigError                 exit 2   the config, or a command's arguments
    │   └── RunMismatch             exit 2   the output holds a run with another identity
    ├── StorageError                         an object store said no
    │   ├── ObjectNotFound
    │   ├── BucketNotFound
    │   ├── AccessDenied
    │   ├── ObjectUnreadable                 this object is denied or archived, others are not
    │   ├── AlreadyExists                    a conditional create lost the race
    │   ├── ObjectChanged                    If-Match failed: not the object that was listed
    │   ├── ShortRead                        fewer bytes than announced
    │   ├── StorageFull
    │   ├── StorageUnavailable               still failing after the retries
    │   └── NotAtomic                        the store cannot create atomically
    ├── InvalidRow                           an annotation row contradicts its own schema
    ├── SourceError                          nothing to label, or not what it claims to be
    │   ├── SourceEmpty
    │   └── SourceTruncated                  a tar ended in the middle
    ├── ImageError                           one image; becomes a row, never ends a shard
    │   ├── Undecodable
    │   ├── TooLarge
    │   └── Unsupported
    ├── ModelError                           checkpoint, architecture, runtime
    │   ├── CheckpointError
    │   └── ArtefactError                    the model made ready for a runtime
    ├── WorkerError
    │   ├── WorkerLost                       the process or its node is gone
    │   ├── WorkerStartFailed
    │   ├── RayLost                          Ray's head, or Ray on this machine, is gone
    │   ├── WorkerDiskFull                   no room for its spool file: the node's fault
    │   └── ShardFailed                      one attempt at one shard failed
    ├── BelowTheMark                exit 4   the model does not reach the mAP of `gate`
    ├── TruthMismatch                        ground truth and rows do not join
    ├── ReviewError                          Label Studio, or what came back from it
    ├── ClusterLost                          the job server does not answer any more
    ├── RunLocked                   exit 75  somebody else holds the run
    └── Interrupted                 exit 130 stopped on request; the run can be continued

A message says what was wrong and where; ``hint`` says what to do about it. Foreign errors
(botocore, OSError, RayError, ApiError) are translated once, where they enter.
"""

from __future__ import annotations

from typing import Literal


class LabelfleetError(Exception):
    """Base of the tree.

    Args:
        message: what was wrong, and where.
        hint: what the reader can do about it; printed on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  -> {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders; keyword-only arguments would be lost by the default.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[LabelfleetError], message: str, hint: str | None) -> LabelfleetError:
    return kind(message, hint=hint)


class ConfigError(LabelfleetError):
    """The config file or a command's arguments cannot be used."""

    exit_code = 2


class RunMismatch(ConfigError):
    """The output already holds a run whose inference config differs."""


class StorageError(LabelfleetError):
    """An object store refused or failed."""


class ObjectNotFound(StorageError):
    """No object under this key."""


class BucketNotFound(StorageError):
    """The bucket, container or root folder does not exist."""


class AccessDenied(StorageError):
    """Credentials are missing, wrong, expired, or lack the permission."""


class ObjectUnreadable(StorageError):
    """This object alone cannot be read: a policy forbids it, or it is archived."""


class AlreadyExists(StorageError):
    """A conditional create found the key taken."""


class ObjectChanged(StorageError):
    """The object is not the one that was listed (its etag differs), or an If-Match put lost."""


class ShortRead(StorageError):
    """Fewer bytes arrived than were announced."""


class StorageFull(StorageError):
    """No space left."""


class StorageUnavailable(StorageError):
    """Timeouts, resets or 5xx answers outlasted the retries."""


class NotAtomic(StorageError):
    """The store has no atomic create, so it cannot hold a run's output."""


class InvalidRow(LabelfleetError):
    """A row a reader could not trust (a box outside its image, a score of 2): a bug, said aloud."""


class SourceError(LabelfleetError):
    """The source cannot be labelled as it stands."""


class SourceEmpty(SourceError):
    """The listing holds no image and no shard."""


class SourceTruncated(SourceError):
    """A tar ended in the middle of a member; what came before was readable."""


class ImageError(LabelfleetError):
    """One image cannot be labelled; ``status`` is the value its row carries."""

    status: Literal["undecodable", "too_large", "unsupported"] = "undecodable"


class Undecodable(ImageError):
    """The bytes are not a readable image."""


class TooLarge(ImageError):
    """The header announces more pixels, or the object more bytes, than the run allows."""

    status: Literal["undecodable", "too_large", "unsupported"] = "too_large"


class Unsupported(ImageError):
    """A readable file of a kind that is not labelled (a link in a tar, an unknown format)."""

    status: Literal["undecodable", "too_large", "unsupported"] = "unsupported"


class ModelError(LabelfleetError):
    """The model cannot be built or run."""


class CheckpointError(ModelError):
    """The checkpoint is corrupt, hostile, or does not fit the architecture."""


class ArtefactError(ModelError):
    """A runtime artefact is gone, damaged, not the run's, or would cost too much accuracy."""


class WorkerError(LabelfleetError):
    """Something went wrong on a worker."""


class WorkerLost(WorkerError):
    """The worker's process or node is gone."""


class WorkerStartFailed(WorkerError):
    """A worker could not be started."""


class RayLost(WorkerError):
    """The Ray cluster's head does not answer any more, or Ray on the driver's machine died."""


class WorkerDiskFull(WorkerError):
    """A worker has no room for the Parquet it is writing; its node is short, not the output."""


class ShardFailed(WorkerError):
    """One attempt at one shard failed; the message names the shard and the cause."""


class BelowTheMark(LabelfleetError):
    """The model does not reach the mAP that `gate` asks for; nothing was labelled."""

    exit_code = 4


class TruthMismatch(LabelfleetError):
    """Ground truth could not be joined to the rows unambiguously."""


class ReviewError(LabelfleetError):
    """Label Studio refused, or sent back something that cannot be used."""


class ClusterLost(LabelfleetError):
    """A cluster's job server stopped answering; what runs there goes on without us."""


class RunLocked(LabelfleetError):
    """Another process holds the run's lock."""

    exit_code = 75


class Interrupted(LabelfleetError):
    """Stopped on request; everything committed so far stays, the run can be continued."""

    exit_code = 130
