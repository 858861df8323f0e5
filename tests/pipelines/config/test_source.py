"""What a run labels: what may be missing from a source, and what is said when too much is."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_drop
from storage.errors import SourceError
from storage.runs.listing import ListingDrop


def config_of(**source: Any) -> RunConfig:
    fields = {"name": "n", "output": "/out", "model": {"checkpoint": "m.pth"}}
    return RunConfig.model_validate(fields | {"source": {"url": "/in", **source}})


@pytest.mark.parametrize(
    ("drop", "max_drop", "refused"),
    [
        (ListingDrop(1000, 100, 0, ()), None, False),
        (ListingDrop(1000, 101, 0, ()), None, True),
        (ListingDrop(1000, 3, 1, ("b",)), None, True),
        (ListingDrop(1000, 101, 0, ()), 0.2, False),
        (ListingDrop(1000, 1000, 2, ("a", "b")), 1.0, False),
        (ListingDrop(0, 0, 0, ()), None, False),
        (ListingDrop(10, 1, 0, ()), 0.0, True),
    ],
)
def test_a_drop_beyond_max_drop_or_of_a_folder_is_refused(
    drop: ListingDrop, max_drop: float | None, refused: bool
) -> None:
    config = config_of() if max_drop is None else config_of(max_drop=max_drop)
    if not refused:
        check_drop(config, drop)
        return
    with pytest.raises(SourceError, match=rf"^{drop.deleted:,} of {drop.known:,} objects") as said:
        check_drop(config, drop)
    assert "--accept-drop" in (said.value.hint or "")
    assert all(f"'{name}/'" in said.value.message for name in drop.examples)
