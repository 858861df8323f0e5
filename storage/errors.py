"""All errors that labelfleet raises deliberately:

    LabelfleetError                 exit 1
    ├── ConfigError                 exit 2   the config, or a command's arguments
    │   └── RunMismatch             exit 2   the output holds a run with another identity
    ├── StorageError                         an object store refused or failed
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
    ├── SourceError                          nothing to label, or not the format it claims
    │   ├── SourceEmpty
    │   └── SourceTruncated                  a tar ended in the middle
    ├── ImageError                           one image; becomes a row, never ends a shard
    │   ├── Undecodable
    │   ├── TooLarge
    │   └── Unsupported
    ├── ModelError                           checkpoint, architecture, runtime
    │   ├── CheckpointError
    │   ├── ArtefactError                    a model compiled for a runtime
    │   └── OutputNotFinite                  NaN or infinity for an image; it becomes a row
    ├── WorkerError
    │   ├── WorkerLost                       the process or its node is gone
    │   ├── WorkerStartFailed
    │   ├── RayLost                          Ray's head, or Ray on this machine, is gone
    │   ├── WorkerDiskFull                   no room for the spool file on its node
    │   └── ShardFailed                      one attempt at one shard failed
    ├── BelowTheMark                exit 4   the model does not reach the mAP of `gate`
    ├── WaitingForPeople            exit 5   a round whose reviewers are not done yet
    ├── TruthMismatch                        ground truth and rows do not join
    ├── ReviewError                          Label Studio, or what came back from it
    ├── NotInstalled                         a package of an extra is missing
    ├── ClusterLost                          the job server stopped answering
    ├── RunLocked                   exit 75  another process holds the run
    └── Interrupted                 exit 130 stopped on request; the run can be continued

A message says what went wrong and where; ``hint`` says what to do about it. Third-party errors
(botocore, OSError, RayError, ApiError) are translated once, where they enter.
"""

from __future__ import annotations

from typing import Literal


class LabelfleetError(Exception):
    """Base of the tree.

    Args:
        message: what went wrong, and where.
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
    """A row with impossible values (a box outside its image, a score of 2); indicates a bug."""


class SourceError(LabelfleetError):
    """The source cannot be labelled as it stands."""


class SourceEmpty(SourceError):
    """The listing contains neither images nor shards."""


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
    """The file is readable but of a type that is not labelled (a link in a tar, say)."""

    status: Literal["undecodable", "too_large", "unsupported"] = "unsupported"


class ModelError(LabelfleetError):
    """The model cannot be built or run."""


class CheckpointError(ModelError):
    """The checkpoint is corrupt, hostile, or does not fit the architecture."""


class ArtefactError(ModelError):
    """A runtime artefact is missing, damaged, from another run, or loses too much accuracy."""


class OutputNotFinite(ModelError):
    """The network gave NaN or infinity for an image."""


class WorkerError(LabelfleetError):
    """Something went wrong on a worker."""


class WorkerLost(WorkerError):
    """The worker's process or node is gone."""


class WorkerStartFailed(WorkerError):
    """A worker could not be started."""


class RayLost(WorkerError):
    """The Ray cluster's head stopped answering, or Ray on the driver's machine died."""


class WorkerDiskFull(WorkerError):
    """A worker's node has no disk space for the Parquet being written; the output store is fine."""


class ShardFailed(WorkerError):
    """One attempt at one shard failed; the message names the shard and the cause."""


class BelowTheMark(LabelfleetError):
    """The model does not reach the mAP that `gate` asks for; nothing was labelled."""

    exit_code = 4


class WaitingForPeople(LabelfleetError):
    """A round goes on when its reviewers are done; what was done so far is recorded."""

    exit_code = 5


class TruthMismatch(LabelfleetError):
    """Ground truth could not be joined to the rows unambiguously."""


class ReviewError(LabelfleetError):
    """Label Studio refused, or sent back something that cannot be used."""


class NotInstalled(LabelfleetError):
    """A package is missing that only some commands need; the hint names the extra."""


class ClusterLost(LabelfleetError):
    """A cluster's job server stopped answering; jobs there keep running."""


class RunLocked(LabelfleetError):
    """Another process holds the run's lock."""

    exit_code = 75


class Interrupted(LabelfleetError):
    """Stopped on request; all commits so far are kept, and the run can be continued."""

    exit_code = 130
