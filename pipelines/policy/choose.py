"""Choose the policy that a command uses."""

from __future__ import annotations

from pipelines.policy.policy import Policy
from storage.objects.protocols import StorageOptions
from storage.review.queue import queue_parts, read_head
from storage.runs.manifest import Manifest


def choose_policy(
    manifest: Manifest,
    url: str | None,
    accept: float | None,
    reject: float | None,
    options: StorageOptions | None = None,
) -> Policy:
    """Return the policy at ``url``, else the one ``fit`` stored, else that of the last routing.

    Without any of them, return the default. Thresholds given by hand replace its own.

    Raises:
        ConfigError: it cannot be read, or the thresholds contradict each other.
    """
    policy = _policy_of(manifest) if url is None else Policy.load(url, options)
    if accept is None and reject is None:
        return policy
    return policy.with_thresholds(accept, reject)


def _policy_of(manifest: Manifest) -> Policy:
    fitted = Policy.of_run(manifest.store, manifest.url)
    if fitted is not None:
        return fitted
    parts = queue_parts(manifest.store)
    return Policy.from_config(read_head(manifest.store, parts[-1]).policy) if parts else Policy()


def thresholds_on(policy: Policy) -> str:
    """Return what thresholds of this policy are compared with: ``probability`` or ``score``."""
    return "score" if policy.calibration is None else "probability"


def given_meaning(policy: Policy, accept: float | None, reject: float | None) -> str:
    """Explain thresholds given by hand under this policy; '' where none is given."""
    given = " and ".join(
        f"--{name} {value:g}" for name, value in (("accept", accept), ("reject", reject))
        if value is not None
    )  # fmt: skip
    if not given:
        return ""
    if policy.calibration is None:
        return f"{given} is a raw score of the model: the policy has no calibration"
    return f"{given} is a probability of being right: the policy is calibrated"
