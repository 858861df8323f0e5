"""Answers that are gone: how many at once are believed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pipelines.label_studio.client import Project
from pipelines.review.withdrawals import too_many
from storage.review.answers import Answer

HERE = Project(1, "cells", {}, "", 0, 0, made_at="2026-01-01")


def answer(number: int, project: str) -> Answer:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Answer(
        f"{number}.jpg", f"{number:064x}", number, number, "ann", 20.0, at, False, (), (), "m",
        False, project=project,
    )  # fmt: skip


@pytest.mark.parametrize(("elsewhere", "old"), [(0, False), (1000, False), (0, True)])
def test_most_of_a_project_is_too_many_whatever_other_projects_hold(
    elsewhere: int, old: bool
) -> None:
    mine = [answer(n, "" if old else HERE.identity) for n in range(20)]
    records = mine + [answer(100 + n, "7@2025-01-01") for n in range(elsewhere)]
    gone = [replace(a, withdrawn="deleted") for a in mine]
    assert not too_many(gone[:10], records, HERE)
    assert too_many(gone[:11], records, HERE)


def test_a_few_are_always_believed() -> None:
    mine = [answer(n, HERE.identity) for n in range(5)]
    assert not too_many([replace(a, withdrawn="deleted") for a in mine], mine, HERE)
