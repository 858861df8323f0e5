"""The demo, whole, on real Ray: every file accounted for, and a second one has nothing to do."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pipelines.demo.oddities import BROKEN


@pytest.mark.slow
def test_it_labels_its_own_pages_and_then_has_nothing_left_to_do(tmp_path: Path) -> None:
    from pipelines.demo.run import demo_text, run_demo

    first = run_demo(tmp_path, images=60)
    assert first.run.images == 60
    assert first.run.ok == 60 - len(BROKEN)
    assert first.run.too_large == 1
    assert first.run.undecodable == len(BROKEN) - 1
    assert first.run.shards == 2
    assert first.map50 is not None
    assert first.map50 > 0.7
    assert (tmp_path / "run" / "report" / "index.html").stat().st_size > 10_000
    config = yaml.safe_load(Path(first.config).read_text())
    assert config["model"]["licence"] == "Apache-2.0"

    second = run_demo(tmp_path, images=60)
    assert second.run.new_images == 0
    assert second.run.images == 60
    assert second.map50 == first.map50
    assert asdict(second).keys() == asdict(first).keys()

    shown = io.StringIO()
    Console(file=shown, width=300).print(demo_text(second))
    for place in (second.config, second.output, second.truth, second.report):
        assert Path(place).exists()
        assert place in shown.getvalue()
    assert second.to_fields()["images"] == 60
    assert second.to_fields()["shards"] == 2
    assert second.to_fields()["mAP50"] == second.map50
    assert second.to_fields()["plain_mAP50"] == second.plain_map50
    assert not any("map" in name for name in second.to_fields())
