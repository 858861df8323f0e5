"""What a score means: accept, review, ignore or reject per box. Pure functions, no I/O but load.

A box is judged by its score, calibrated first where the policy brings a calibration:

    score >= accept            ACCEPT   it is a label
    score <  reject            REJECT   it is dropped
    in between, image queued   REVIEW   a person is asked; the box is shown to them
    in between, otherwise      IGNORE   no answer expected: neither label nor background

Thresholds may differ by class. Scores and thresholds are compared as float32, the precision that
rows have, so that a score written as 0.7 meets ``accept: 0.7``.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipelines.config.part import Part, Share
from pipelines.config.yaml_files import load_yaml, parse_config
from pipelines.policy.statement import Guarantee
from storage.errors import ConfigError, ObjectNotFound
from storage.objects.protocols import StorageOptions, SupportsGet
from storage.records import Category, RunIdentity
from storage.stores.open import open_object
from storage.urls import shown_url

POLICY_KEY = "policy.yaml"  # below a run's output, where `fit` leaves it
Knots = Annotated[tuple[Share, ...], Field(min_length=1)]


class Decision(IntEnum):
    """Ordered: a higher score never gets a lower decision."""

    REJECT = 0
    IGNORE = 1
    REVIEW = 2
    ACCEPT = 3


class Curve(Part):
    """A monotone map from score to the share of such boxes that are right (isotonic regression).

    Between knots it is linear, outside them constant, as scikit-learn's ``IsotonicRegression``
    with ``out_of_bounds="clip"`` predicts.
    """

    scores: Knots = Field(description="Ascending.")
    probabilities: Knots = Field(description="One a score, never falling.")

    @model_validator(mode="after")
    def _monotone(self) -> Curve:
        if len(self.scores) != len(self.probabilities):
            raise ValueError("scores and probabilities differ in length")
        for name, values in (("scores", self.scores), ("probabilities", self.probabilities)):
            if any(b < a for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name} decrease somewhere; a calibration never does")
        return self

    def __call__(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """float64 of the same shape, in [0, 1]."""
        out: NDArray[np.float64] = np.interp(scores, self.scores, self.probabilities)
        return out


class Calibration(Part):
    """How raw scores become probabilities of being right; by class where boxes sufficed."""

    all: Curve = Field(description="For classes without a curve of their own.")
    classes: dict[str, Curve] = Field(default_factory=dict, description="By class name.")
    iou: float = Field(0.5, gt=0, le=1, description="Right means: same class, this IoU or more.")

    def of(self, name: str) -> Curve:
        """Return the curve of one class."""
        return self.classes.get(name, self.all)


class ClassThresholds(Part):
    """Thresholds of one class; what is not given is the policy's."""

    accept: Share | None = Field(None, description="From this score on, a box is a label.")
    reject: Share | None = Field(None, description="Below this score, a box is dropped.")
    accept_score: Share | None = Field(
        None, description="Raw score that a label needs besides; a guarantee sets it."
    )
    known: Share | None = Field(
        None, description="Share of its objects that labels and undecided boxes cover, by the fit."
    )


_NOTHING_OWN = ClassThresholds.model_validate({})


class Policy(Part):
    """Thresholds, and the calibration they are meant on: what policy.yaml holds."""

    accept: Share = Field(0.7, description="From this score on, a box is a label.")
    reject: Share = Field(0.1, description="Below this score, a box is dropped.")
    classes: dict[str, ClassThresholds] = Field(default_factory=dict, description="By class name.")
    calibration: Calibration | None = Field(
        None, description="Applied to scores before any threshold."
    )
    one_object: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="Boxes that overlap with this IoU or more are one object, whatever their "
        "classes: the likeliest stays; null: all stay.",
    )
    model_sha256: str | None = Field(
        None, description="The model it was fitted on; other models' scores mean something else."
    )
    precision: str | None = Field(
        None, description="Arithmetic it was fitted in; int8 scores mean something else than fp32."
    )
    guarantee: Guarantee | None = Field(None, description="What `fit --guarantee` showed.")

    @model_validator(mode="after")
    def _ordered(self) -> Policy:
        for name in ("", *self.classes):
            accept, reject = self.of(name)
            if reject > accept:
                where = f"classes.{name}: " if name else ""
                raise ValueError(f"{where}reject {reject} is above accept {accept}")
        return self

    def of(self, name: str) -> tuple[float, float]:
        """(accept, reject) of one class."""
        own = self.classes.get(name, _NOTHING_OWN)
        accept = self.accept if own.accept is None else own.accept
        return accept, self.reject if own.reject is None else own.reject

    def _least_score(self, name: str) -> float:
        """Raw score that a label of a class needs besides; inf where its guarantee has none."""
        own = self.classes.get(name, _NOTHING_OWN).accept_score
        if own is None:
            return 0.0
        said = self.guarantee
        unproven = said is not None and said.by == "class" and name not in said.thresholds
        return math.inf if unproven else own

    @staticmethod
    def from_config(fields: Mapping[str, Any] | Part, *, where: str = "policy") -> Policy:
        """Parse a policy from a mapping such as ``{accept: 0.7}``, or a config section.

        Raises:
            ConfigError: naming the key, what is wrong and the nearest valid key.
        """
        plain = fields.model_dump() if isinstance(fields, Part) else dict(fields)
        return parse_config(Policy, plain, where=where)

    @staticmethod
    def load(url: str, options: StorageOptions | None = None) -> Policy:
        """Read a policy.yaml from a path or URL. Raises ConfigError when it is not one."""
        store, key = open_object(url, options)
        return Policy.from_yaml(store.get(key), where=url)

    @staticmethod
    def of_run(store: SupportsGet, where: str) -> Policy | None:
        """Return the policy that ``fit`` stored with a run, or None. Raises as ``load``."""
        try:
            raw = store.get(POLICY_KEY)
        except ObjectNotFound:
            return None
        return Policy.from_yaml(raw, where=f"{where}/{POLICY_KEY}")

    @staticmethod
    def from_yaml(raw: bytes, *, where: str) -> Policy:
        """Parse a policy.yaml's bytes. Raises ConfigError when they are not a policy."""
        fields = load_yaml(raw, where)
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{shown_url(where)} holds no policy: a mapping such as {{accept: 0.7}} is expected"
            )
        return Policy.from_config(fields, where=where)

    def with_thresholds(self, accept: float | None, reject: float | None) -> Policy:
        """Return the policy with thresholds given by hand, which hold for every class.

        An ``accept`` given by hand voids a guarantee, which holds for its own thresholds.

        Raises:
            ConfigError: they contradict each other, or what is left.
        """
        given = {n: v for n, v in (("accept", accept), ("reject", reject)) if v is not None}
        void = {"accept": "accept_score", "reject": "known"}  # what a threshold takes with it
        dropped = {*given, *(void[name] for name in given)}
        classes = {
            name: {k: v for k, v in own.model_dump().items() if k not in dropped}
            for name, own in self.classes.items()
        }
        fields = self.to_fields() | given | {"classes": classes}
        if self.guarantee is not None and "accept" in given:
            void = {"void": "--accept was given by hand"}
            fields["guarantee"] = self.guarantee.model_dump(mode="json") | void
        return Policy.from_config(fields, where="--accept, --reject")

    def to_fields(self) -> dict[str, Any]:
        """Return what is set, as plain JSON values; ``from_config`` gives the same policy back."""
        return self.model_dump(mode="json", exclude_defaults=True) | {
            "accept": self.accept,
            "reject": self.reject,
            "one_object": self.one_object,
        }

    def to_yaml(self) -> str:
        """policy.yaml: the inverse of ``load``."""
        return yaml.safe_dump(self.to_fields(), sort_keys=True)

    def digest(self) -> str:
        """12 hex digits of sha256: two policies that decide alike by their text share it."""
        text = json.dumps(self.to_fields(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def for_run(self, identity: RunIdentity) -> Thresholds:
        """Return the policy for a run, refused where the run's scores mean something else.

        Raises:
            ConfigError: as ``thresholds``, or it was fitted on int8 scores and the run's are not,
                or the other way round.
        """
        mine, its = self.precision or identity.precision, identity.precision
        if mine != its and "int8" in (mine, its):
            void = "; its guarantee is void" if self.guarantee else ""
            raise ConfigError(
                f"the policy was fitted on {mine} scores, the run's are {its}{void}",
                hint="fit a policy on this run, or delete precision from it if you mean it",
            )
        return self.thresholds(identity.categories, identity.model_sha256)

    def thresholds(
        self, categories: Sequence[Category], model_sha256: str | None = None
    ) -> Thresholds:
        """Return the policy for a list of classes.

        Raises:
            ConfigError: it names a class that is not among them, or was fitted on another model.
        """
        if self.model_sha256 and model_sha256 and self.model_sha256 != model_sha256:
            void = "; its guarantee is void" if self.guarantee else ""
            raise ConfigError(
                f"the policy was fitted on model {self.model_sha256[:12]}, "
                f"the run's is {model_sha256[:12]}{void}",
                hint="fit a policy on this run, or delete model_sha256 from it if you mean it",
            )
        _refuse_unknown(self, [c.name for c in categories])
        pairs = np.array([self.of(c.name) for c in categories], np.float32).reshape(-1, 2)
        own = [self._least_score(c.name) for c in categories]
        curves = _curves(self.calibration, categories)
        least = np.array(own, np.float32)
        return Thresholds(pairs[:, 0], pairs[:, 1], curves, self.one_object, least)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A policy for one list of classes.

    Attributes:
        accept, reject: float32 [classes], by contiguous category id.
        curves: a calibration by category id, or None: scores stand as they are.
        one_object: from this IoU on, boxes of one image are one object; None: never.
        accept_score: float32 [classes], raw scores that labels need besides; None: no such.
    """

    accept: NDArray[np.float32]
    reject: NDArray[np.float32]
    curves: tuple[Curve, ...] | None
    one_object: float | None = None
    accept_score: NDArray[np.float32] | None = None

    def scores(
        self, scores: NDArray[np.float32], category_ids: NDArray[np.int16]
    ) -> NDArray[np.float32]:
        """Return the values to threshold: float32 [N], calibrated where there is a curve."""
        if self.curves is None:
            return scores.astype(np.float32)
        return _by_class(self.curves, scores, category_ids).astype(np.float32)

    def probability(
        self, scores: NDArray[np.float32], category_ids: NDArray[np.int16]
    ) -> NDArray[np.float64]:
        """Return each box's probability of being right, float64 [N]: calibrated, else prior."""
        if self.curves is None:
            return prior(scores)
        return _by_class(self.curves, scores, category_ids)

    def decide(
        self,
        scores: NDArray[np.float32],
        category_ids: NDArray[np.int16],
        queued: bool | NDArray[np.bool_] = False,
    ) -> NDArray[np.int8]:
        """Return one ``Decision`` per box.

        Args:
            scores: float32 [N], raw.
            category_ids: int16 [N].
            queued: whether a person is asked about the image; one bool, or one a box.

        Returns:
            int8 [N].
        """
        judged = self.scores(scores, category_ids)
        band = np.where(queued, np.int8(Decision.REVIEW), np.int8(Decision.IGNORE))
        out = np.broadcast_to(band, judged.shape).astype(np.int8)
        out[judged < self.reject[category_ids]] = Decision.REJECT
        accepted = judged >= self.accept[category_ids]
        if self.accept_score is not None:
            accepted &= scores.astype(np.float32) >= self.accept_score[category_ids]
        out[accepted] = Decision.ACCEPT
        return out


def prior(scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Probability of being right where nothing was calibrated: logistic, 0.5 at score 0.55.

    YOLO-NAS scores are trained towards IoU, so they lie below the share of boxes that are right at
    the top and far above it at the bottom: on blood cells, 5 % right at .2 to .3, 49 % at .5 to
    .6, 100 % from .9 on. A calibration is better; this only has to rank sensibly.
    """
    out: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-10.0 * (scores.astype(np.float64) - 0.55)))
    return out


def counts(decisions: NDArray[np.int8]) -> dict[str, int]:
    """Count boxes by decision, every decision named; the counts add up to all boxes."""
    found = np.bincount(decisions, minlength=len(Decision))
    return {decision.name.lower(): int(found[decision]) for decision in Decision}


def _by_class(
    curves: Sequence[Curve], scores: NDArray[np.float32], category_ids: NDArray[np.int16]
) -> NDArray[np.float64]:
    out = np.empty(scores.shape, np.float64)
    for category_id in np.unique(category_ids):
        here = category_ids == category_id
        out[here] = curves[category_id](scores[here])
    return out


def _curves(
    calibration: Calibration | None, categories: Sequence[Category]
) -> tuple[Curve, ...] | None:
    if calibration is None:
        return None
    return tuple(calibration.of(c.name) for c in categories)


def _refuse_unknown(policy: Policy, names: Sequence[str]) -> None:
    calibrated = policy.calibration.classes if policy.calibration else {}
    for name in (*policy.classes, *calibrated):
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}"
            raise ConfigError(f"the policy names a class the run lacks: {name!r}", hint=hint)
