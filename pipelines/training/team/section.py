"""The section ``workers`` of a training's config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.part import Part


class TeamConfig(Part):
    """Processes that train together, each on its part of every batch."""

    count: int | tuple[int, int] = Field(
        0,
        description="Workers of a Ray cluster; 0: this process alone, without Ray; [2, 8]: as many "
        "of them as there is room for, while nodes come and go.",
    )
    gpus: Literal[0, 1] = Field(0, description="GPUs of each worker; 0: they train on CPUs.")
    restarts: int = Field(
        16,
        ge=0,
        description="Times that lost workers are replaced before the training gives up; nodes "
        "that said they would go do not count.",
    )

    @field_validator("count")
    @classmethod
    def _range(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if isinstance(value, tuple) and not 1 <= low < high:
            raise ValueError("write [least, most] with 1 ≤ least < most, or one number")
        if not 0 <= low <= high <= 4096:
            raise ValueError("between 0 and 4096 workers")
        return value

    @model_validator(mode="after")
    def _gpus_of_workers(self) -> TeamConfig:
        if self.gpus and not self.most:
            raise ValueError(
                "gpus: those of a worker, and count: 0 has none; set `device: cuda` to train in "
                "this process on its GPU"
            )
        return self

    @property
    def least(self) -> int:
        """The fewest workers that the training starts with; 0: this process."""
        return self.count[0] if isinstance(self.count, tuple) else self.count

    @property
    def most(self) -> int:
        """The most workers that the training can have; 0: this process."""
        return self.count[1] if isinstance(self.count, tuple) else self.count


def refuse_team(asked: TeamConfig, *, batch_size: int, accumulate: int, device: str) -> None:
    """Raise ValueError when a batch cannot be shared out, or the device is another."""
    if asked.least == asked.most and batch_size % (asked.most * accumulate):
        parts = f"{asked.most} equal parts"
        if accumulate > 1:
            parts += f", each accumulated over {accumulate}"
        raise ValueError(f"workers.count: a batch_size of {batch_size} does not split into {parts}")
    if asked.most * accumulate > batch_size:
        raise ValueError(
            f"workers.count: {asked.most} workers for a batch_size of {batch_size}: each needs "
            "an image" + (" for every part it accumulates" if accumulate > 1 else "")
        )
    if device != "auto" and (device == "cuda") != bool(asked.gpus):
        raise ValueError(
            f"device: {device} contradicts workers.gpus: {asked.gpus}; leave it at auto"
        )
