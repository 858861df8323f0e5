"""The exit code of a labelling run, in one table; docs/operations.md shows the same lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.labelling.summary import RunSummary
from storage.errors import BelowTheMark

LEFT_OUT = 3
BELOW_THE_MARK = BelowTheMark.exit_code
STOPPED = 130


@dataclass(frozen=True, slots=True)
class Rule:
    """A line of the table.

    Attributes:
        what: the situation, as the docs name it.
        code: exit code of `labelfleet run`.
        strict: exit code of `labelfleet run --strict`.
        holds: whether a run is in that situation.
    """

    what: str
    code: int
    strict: int
    holds: Callable[[RunSummary], bool]


# The first line that holds decides.
RULES = (
    Rule("stopped on request with work left", STOPPED, STOPPED, lambda s: s.outcome == "stopped"),
    Rule("a shard is in quarantine", LEFT_OUT, LEFT_OUT, lambda s: s.quarantined > 0),
    Rule(
        "a larger share of images than `max_bad_share` is not ok",
        LEFT_OUT, LEFT_OUT,
        lambda s: s.images - s.ok > s.max_bad_share * s.images,
    ),
    Rule(
        "there are images, and none of them is ok",
        LEFT_OUT, LEFT_OUT,
        lambda s: s.images > 0 and s.ok == 0,
    ),
    Rule("a tar ended in the middle", LEFT_OUT, LEFT_OUT, lambda s: bool(s.truncated)),
    Rule("`--limit` left shards for the next run", 0, LEFT_OUT, lambda s: s.left > 0),
    Rule("an image is not ok (undecodable, missing, …)", 0, LEFT_OUT, lambda s: s.ok < s.images),
    Rule("everything listed is labelled", 0, 0, lambda s: True),
)  # fmt: skip


def exit_code(summary: RunSummary, *, strict: bool = False) -> int:
    """Return the exit code that the table gives for a run."""
    rule = next(rule for rule in RULES if rule.holds(summary))
    return rule.strict if strict else rule.code
