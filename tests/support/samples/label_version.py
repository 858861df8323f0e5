"""A small run with a label version: real images in tars and alone, a box each, some by people."""

from __future__ import annotations

from datetime import UTC, datetime

from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Calibration, Curve, Policy
from storage.objects.protocols import ObjectStore
from storage.records import AnnotationRow
from storage.review.answers import Answer, ReviewedBox, append_answers
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from tests.support.samples.labelled_run import label, png
from tests.support.samples.tar_samples import tar_of, zipped

# The detector scores the mean brightness of a picture, about 0.5 on all of them.
CALIBRATED = Policy(
    accept=0.5,
    reject=0.1,
    calibration=Calibration(all=Curve(scores=(0.0, 1.0), probabilities=(0.4, 1.0)), classes={}),
)
UNDECIDED = Policy(accept=0.99, reject=0.1)


def fill_source(source: ObjectStore) -> None:
    """Four loose images, a tar of three and a compressed tar of three; one image is broken."""
    for i in range(4):
        source.put(f"loose/{i:03}.png", png(i))
    members = [(f"{m}.png", png(10 + m)) for m in range(3)]
    source.put("tars/0.tar", tar_of(*members, ("bad.png", b"no picture")))
    source.put("tars/1.tar.gz", zipped(tar_of(*((f"{m}.png", png(20 + m)) for m in range(3)))))


def labelled(source: ObjectStore, output: ObjectStore, policy: Policy = CALIBRATED) -> Manifest:
    """Label and decide; people answered the first two loose images, the second one as empty."""
    fill_source(source)
    manifest = label(source, output)
    rows = [row for row in live_rows(manifest) if row.image_id.startswith("loose/")]
    drawn = ReviewedBox((5.0, 6.0, 25.0, 30.0), "dark", "added")
    append_answers(output, [_answer(rows[0], drawn), _answer(rows[1])])
    decide_run(manifest, policy)
    return manifest


def _answer(row: AnnotationRow, *boxes: ReviewedBox) -> Answer:
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
    return Answer(
        row.image_id, row.sha256, 1, 1, "ann", 3.5, noon, False, boxes, (), "m", False
    )  # fmt: skip
