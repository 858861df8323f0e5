"""A guarantee as policy.yaml holds it: for which images, labels and model it is valid."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field

from pipelines.config.part import Part, Share
from storage.records import RunIdentity

By = Literal["all", "class"]


class Guarantee(Part):
    """A share of accepted boxes that is right with a stated confidence."""

    target: Share = Field(description="Share of accepted boxes that is right, at least.")
    confidence: Share = Field(description="How often such a statement holds, at least.")
    by: By = Field("all", description="all: over all accepted boxes. class: of every class.")
    thresholds: dict[str, Share] = Field(description="Raw scores from which boxes are accepted.")
    run: str = Field(description="Whose images it speaks for.")
    images: int = Field(description="How many.")
    audited: int = Field(description="Of those drawn at random and looked at.")
    source: str = Field(description="What said which boxes are right.")
    assumes: str = Field("", description="What has to be true beside the draw.")
    model_sha256: str = Field(description="The only model it holds for.")
    precision: str = Field("", description="Arithmetic that the model ran in.")
    void: str = Field("", description="Why it no longer holds; '' while it does.")
    stale: str = Field("", description="How later images differ; '' while they do not.")

    @property
    def sentence(self) -> str:
        """Return the statement with its limits."""
        if self.void:
            return f"The guarantee of {self.target:.0%} is void: {self.void}."
        whose = {"all": "all accepted boxes", "class": "the accepted boxes of each named class"}
        at = ", ".join(f"{name} from {t:g}" for name, t in self.thresholds.items())
        said = (
            f"At least {self.target:.0%} of {whose[self.by]} ({at}) are right, with "
            f"{self.confidence:.0%} confidence, over the {self.images:,} images of {self.run}, by "
            f"{self.audited:,} audited images ({self.source}). Right means: same class, IoU 0.5 or "
            "more, counted before boxes on one object are joined. It holds for this model, these "
            "images and these thresholds only."
        )
        said = f"{said} {self.assumes}" if self.assumes else said
        if self.stale:
            said += f" It is stale, {self.stale}. Route and audit the newer images, and fit again."
        return said

    def void_for(self, model_sha256: str, precision: str, run: str) -> str:
        """Return why the guarantee is void for a run; '' if it holds."""
        if self.void:
            return self.void
        if model_sha256 != self.model_sha256:
            return f"it was shown for model {self.model_sha256[:12]}, not {model_sha256[:12]}"
        if self.precision and precision != self.precision:
            return f"it was shown for {self.precision} arithmetic, not {precision}"
        if run != self.run:
            return f"it was shown for the images of {self.run}"
        return ""


class _Carries(Protocol):
    """A policy that may carry a guarantee."""

    @property
    def guarantee(self) -> Guarantee | None: ...


def said_for(policy: _Carries, identity: RunIdentity, run: str) -> str:
    """Return the guarantee on a run's labels, or why it is void; '' if the policy has none."""
    held = policy.guarantee
    if held is None:
        return ""
    void = held.void_for(identity.model_sha256, identity.precision, run)
    return held.model_copy(update={"void": void}).sentence
