"""A checkpoint names the models it learned from, and its licence text carries theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage.errors import CheckpointError
from tests.support.samples.checkpoint_samples import weights
from workers.checkpoints.description import Description, read_description
from workers.checkpoints.file import Checkpoint, read_checkpoint, save_checkpoint
from workers.checkpoints.lineage import ancestors_in
from workers.checkpoints.provenance import ancestor, inherited_licence
from workers.images.preprocessing import Preprocessing


def saved(path: Path, licence: str, provenance: dict[str, Any] | None = None) -> Checkpoint:
    save_checkpoint(
        path,
        weights(3),
        Description(
            name="yolo_nas_s",
            arch_params=None,
            classes=("a", "b", "c"),
            preprocessing=Preprocessing(),
            licence=inherited_licence(licence, provenance),
            training={},
            provenance=provenance,
        ),
    )
    return read_checkpoint(path)


def test_a_student_of_a_student_carries_every_licence(tmp_path: Path) -> None:
    coco = saved(tmp_path / "coco.safetensors", "DECI-NC")
    assert coco.provenance is None
    first = saved(
        tmp_path / "first.safetensors", "MIT",
        {"ancestors": [ancestor("teacher", "https://me:secret@host/coco.pth?key=1", coco)]},
    )  # fmt: skip
    assert first.licence == "MIT; learned from weights under DECI-NC"
    second = saved(
        tmp_path / "second.safetensors", "Apache-2.0",
        {"ancestors": [ancestor("first weights", "first.safetensors", first)]},
    )  # fmt: skip
    assert second.licence == "Apache-2.0; learned from weights under MIT, DECI-NC"
    found = ancestors_in(second.provenance)
    assert [(one.role, one.sha256) for one in found] == [
        ("first weights", first.sha256), ("teacher", coco.sha256),
    ]  # fmt: skip
    assert "secret" not in str(second.provenance)
    assert "key=1" not in str(second.provenance)


def learned(*licences: str | None) -> dict[str, Any]:
    said = [{"role": "teacher", "checkpoint": "t.pt", "licence": text} for text in licences]
    return {"ancestors": said}


def test_licences_that_say_nothing_new_add_nothing() -> None:
    assert inherited_licence("MIT", learned(None, "unstated", "MIT", "MIT")) == "MIT"
    assert inherited_licence("MIT", None) == "MIT"
    again = "MIT; learned from weights under DECI-NC"
    assert inherited_licence(again, learned(again)) == again
    assert inherited_licence("unstated", learned("MIT")) == (
        "unstated; learned from weights under MIT"
    )


def test_a_licence_text_counts_though_its_ancestors_were_lost() -> None:
    text = "MIT; learned from weights under DECI-NC, CC-BY"
    assert inherited_licence("MIT", learned(text)) == text


@pytest.mark.parametrize("claimed", ['"a text"', "[1]", '{"ancestors": 3}', '{"ancestors": [7]}'])
def test_a_provenance_of_another_shape_is_refused_or_empty(claimed: str) -> None:
    said_of_itself = Description(
        name="yolo_nas_s", arch_params=None, classes=("a",), preprocessing=Preprocessing(),
        licence=None, training={}, provenance={"ancestors": []},
    )  # fmt: skip
    text = said_of_itself.to_text().replace('{"ancestors": []}', claimed)
    assert claimed in text
    try:
        said = read_description("x.safetensors", text)
    except CheckpointError:
        return
    assert ancestors_in(said["provenance"]) == ()
