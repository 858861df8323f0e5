"""Two workers of a real Ray, one of them killed, train as one process does."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pipelines.demo.digits import make_pages
from pipelines.training.config import TrainConfig
from pipelines.training.validation import Scores
from workers.training.trainer import StepReport

pytestmark = pytest.mark.slow  # Ray

ARCH = Path(__file__).resolve().parents[3] / "pipelines" / "assets" / "digits_nano_arch.yaml"
STEPS, KILLED_AT, SAVED_EVERY = 6, 4, 3


class Witness:
    """Writes down every step, and kills its own process once where the config's name says so."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.folder, self.kills = folder, config["name"] == "killed"

    def step(self, report: StepReport) -> None:
        with (self.folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps([report.step, report.loss, os.getpid()]) + "\n")
        mark = self.folder / "was_killed"
        if self.kills and report.step == KILLED_AT and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def validated(self, step: int, scores: Scores) -> None:
        pass

    def close(self) -> None:
        pass


def losses(folder: Path) -> dict[int, list[float]]:
    """The losses by step: more than one where the step was done again."""
    found = defaultdict(list)
    for line in (folder / "steps.jsonl").read_text().splitlines():
        step, loss, _ = json.loads(line)
        found[step].append(loss)
    return dict(found)


def test_two_workers_one_killed_take_the_steps_of_one_process(tmp_path: Path) -> None:
    from pipelines.training.run import train

    pages = make_pages(tmp_path / "pages", images=6, split="train", broken=False)
    data = {"annotations": str(pages.truth), "images": str(pages.images)}

    def config(name: str, count: int) -> TrainConfig:
        fields = {
            "name": name, "output": str(tmp_path / name), "train": data, "val": data,
            "model": {"arch": str(ARCH)}, "image_size": 96, "batch_size": 4, "precision": "fp32",
            "steps": STEPS, "eval_every": SAVED_EVERY, "threads": 1,
            # So small that rounding, which Adam makes as large as any gradient, stays small.
            "lr": 1e-6, "report": [f"{__name__}:Witness"], "workers": {"count": count},
        }  # fmt: skip
        return TrainConfig.model_validate(fields)

    alone = train(config("alone", 0))
    killed = train(config("killed", 2))
    assert (killed.steps, killed.history[-1][0]) == (alone.steps, STEPS)
    assert (tmp_path / "killed" / "was_killed").exists()
    of_one, of_two = losses(tmp_path / "alone"), losses(tmp_path / "killed")
    assert sorted(of_two) == list(range(1, STEPS + 1))
    # Only what followed the last state was done again, with the same outcome to the last bit.
    assert {step for step, found in of_two.items() if len(found) > 1} == {KILLED_AT}
    assert len(set(of_two[KILLED_AT])) == 1
    for step, [loss] in of_one.items():
        assert of_two[step][-1] == pytest.approx(loss, rel=1e-3)
