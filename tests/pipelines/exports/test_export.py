"""Exports: what a version holds comes back from every format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.exports.export import ExportFormat, ExportRequest, export_version
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from storage.errors import ConfigError
from tests.pipelines.exports.labelled import (
    FORMATS,
    Labelled,
    export_to,
)
from tests.pipelines.exports.reading import READERS, expected_boxes


@pytest.mark.parametrize("format", FORMATS)
def test_every_image_and_box_comes_back(
    loose: Labelled, tmp_path: Path, format: ExportFormat
) -> None:
    summary = export_to(loose, tmp_path / "out", format)
    found, expected = READERS[format](tmp_path / "out"), expected_boxes(loose)
    assert found.keys() == expected.keys()
    for image_id, wanted in expected.items():
        assert len(found[image_id]) == len(wanted)
        for (box, label, ignore), (got, got_label, got_ignore) in zip(
            sorted(wanted, key=str), sorted(found[image_id], key=str), strict=True
        ):
            np.testing.assert_allclose(got, box, atol=2e-3)
            assert (got_label, got_ignore) == (label, ignore)
    assert (summary.images, summary.empty, summary.left_out) == (4, 1, 0)
    assert (summary.labels, summary.ignored) == (5, 2)


def test_places_that_would_mix_are_refused(loose: Labelled, tmp_path: Path) -> None:
    for place in ("run/export", "source/export", "source"):
        with pytest.raises(ConfigError, match="overlaps"):
            export_to(loose, tmp_path / place, "coco")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.txt"):
        export_to(loose, tmp_path / "full", "coco")


def test_an_older_version_can_be_exported(loose: Labelled, tmp_path: Path) -> None:
    decide_run(loose.manifest, Policy(accept=0.95, reject=0.9))
    new = export_version(loose.manifest, str(tmp_path / "new"), ExportRequest("coco"))
    old = export_version(loose.manifest, str(tmp_path / "old"), ExportRequest("coco", "v0001"))
    assert (new.version, old.version) == ("v0002", "v0001")
    assert new.labels < old.labels


@pytest.mark.parametrize("format", FORMATS)
def test_a_card_says_what_the_export_is(
    loose: Labelled, tmp_path: Path, format: ExportFormat
) -> None:
    export_to(loose, tmp_path / "out", format)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# cells, label version v0001" in card
    assert "| Licence of the model | MIT |" in card
    assert "| images | 4 |" in card
    assert "| labels | 5 |" in card
    assert "| Platelets | 2 |" in card
    assert "accept: 0.7" in card
