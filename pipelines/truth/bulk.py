"""Answers that were not given by looking: predictions turned into annotations in bulk.

Label Studio can accept the predictions of many tasks with one action. Such an annotation has no
lead time, since no page was open, and its boxes are exactly the predicted ones. As labels they
repeat the model; as audit answers they would prove the model right.
"""

from __future__ import annotations

from storage.review.answers import Answer


def accepted_in_bulk(answer: Answer) -> bool:
    """Return whether an answer repeats the prediction and was given in no time."""
    return (
        not answer.skipped
        and not answer.was_blind
        and not answer.lead_time_s
        and not answer.deleted
        and all(box.origin == "kept" for box in answer.boxes)
    )
