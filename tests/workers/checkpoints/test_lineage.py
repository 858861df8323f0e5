"""Which licences forbid commercial use, and how they stay with what is made of their weights."""

from __future__ import annotations

from typing import Any

import pytest

from workers.checkpoints.lineage import (
    DECI_LICENCE,
    Ancestor,
    ancestors_in,
    carried_licence,
    is_non_commercial,
    stated_licence,
)


@pytest.mark.parametrize(
    ("licence", "forbids"),
    [
        ("CC-BY-NC-4.0", True),
        ("cc by nc sa 4.0", True),
        ("Deci YOLO-NAS, non-commercial", True),
        ("NonCommercial research", True),
        ("for research use only", True),
        (DECI_LICENCE, True),
        ("MIT; learned from weights under CC-BY-NC-4.0", True),
        ("Apache-2.0", False),
        ("proprietary, Encoder Inc", False),
        ("CC-BY-4.0", False),
        ("unstated", False),
        (None, False),
    ],
)
def test_a_licence_that_forbids_commercial_use_is_told(licence: str | None, forbids: bool) -> None:
    assert is_non_commercial(licence) is forbids


def test_decis_own_weights_state_none_and_have_theirs() -> None:
    assert stated_licence(None, "s3://models/yolo_nas_s_coco.pth") == DECI_LICENCE
    assert stated_licence("unstated", "/a/yolo_nas_l_coco.pth") == DECI_LICENCE
    assert stated_licence(None, "/a/my_yolo_nas_s_coco.pth") == "unstated"
    assert stated_licence("MIT", "/a/yolo_nas_s_coco.pth") == "MIT"
    assert stated_licence(None, "/a/cells.safetensors") == "unstated"


def test_a_config_cannot_license_away_what_the_checkpoint_forbids() -> None:
    assert carried_licence("MIT", "CC-BY-NC-4.0", "a.pth") == (
        "MIT; the checkpoint says: CC-BY-NC-4.0"
    )
    assert is_non_commercial(carried_licence("MIT", None, "/a/yolo_nas_s_coco.pth"))
    assert carried_licence("MIT", "Apache-2.0", "a.pth") == "MIT"
    assert carried_licence("own, NC", "CC-BY-NC-4.0", "a.pth") == "own, NC"
    assert carried_licence(None, "Apache-2.0", "a.pth") == "Apache-2.0"
    assert carried_licence(None, None, "a.pth") == "unstated"


def entry(role: str, name: str, licence: str | None, *own: Any) -> dict[str, Any]:
    return {"role": role, "checkpoint": name, "sha256": "ab", "licence": licence,
            "ancestors": list(own)}  # fmt: skip


def test_ancestors_are_listed_each_once_before_their_own() -> None:
    root = entry("first weights", "https://sghub.deci.ai/models/yolo_nas_s_coco.pth", None)
    teacher = entry("teacher", "s3://a/teacher.safetensors", "MIT", root)
    found = ancestors_in({"ancestors": [teacher, teacher, entry("labels", "cells v0001", "MIT")]})
    assert found == (
        Ancestor("teacher", "teacher.safetensors", "ab", "MIT", 1),
        Ancestor("first weights", "yolo_nas_s_coco.pth", "ab", DECI_LICENCE, 2),
        Ancestor("labels", "cells v0001", "ab", "MIT", 1),
    )
    assert [one.non_commercial for one in found] == [False, True, False]


def test_a_malformed_lineage_is_left_out() -> None:
    """The file's author is not trusted."""
    deep: dict[str, Any] = {}
    at = deep
    for _ in range(900):
        below: dict[str, Any] = {"role": "labels", "checkpoint": "a", "licence": 3}
        at["ancestors"] = [below]
        at = below
    assert 0 < len(ancestors_in(deep)) <= 200
    assert ancestors_in({"ancestors": "x"}) == ()
    assert (
        ancestors_in({"ancestors": [1, {"role": 2, "checkpoint": "a"}, {"role": "labels"}]}) == ()
    )
    assert ancestors_in(None) == ()
