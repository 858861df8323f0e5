"""An export that was killed is continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.exports.export import ExportFormat
from pipelines.exports.place import ExportPlace
from storage.errors import ConfigError
from storage.stores.local_files import LOCK_NAME
from tests.pipelines.exports.labelled import (
    FORMATS,
    Labelled,
    export_to,
)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", ["none", "copy", "link"])
def test_a_killed_export_continues_and_ends_as_if_it_had_not_been(
    loose: Labelled, tmp_path: Path, format: ExportFormat, mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, dest = tmp_path / "whole", tmp_path / "out"
    export_to(loose, whole, format, mode)
    write, link, done = ExportPlace.write, ExportPlace.link, [0]

    def killed_after_three(step: Callable[..., None]) -> Callable[..., None]:
        def act(*args: object) -> None:
            done[0] += 1
            if done[0] > 3:
                raise Killed
            step(*args)

        return act

    if format == "hf":
        monkeypatch.setattr(ExportPlace, "finish", killed_after_three(ExportPlace.finish))
        done[0] = 9
    else:
        monkeypatch.setattr(ExportPlace, "write", killed_after_three(write))
        monkeypatch.setattr(ExportPlace, "link", killed_after_three(link))
        if mode == "none" and format == "coco":
            done[0] = 9
    with pytest.raises(Killed):
        export_to(loose, dest, format, mode)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unfinished export that differs in images") as refused:
        export_to(loose, dest, format, "copy" if mode == "none" else "none")
    assert f"--format {format} --version v0001 --images {mode} " in str(refused.value.hint)
    summary = export_to(loose, dest, format, mode)
    assert summary.left_out == 0
    assert _tree(dest) == _tree(whole)
    with pytest.raises(ConfigError, match="complete export of v0001 already"):
        export_to(loose, dest, format, mode)


def _tree(folder: Path) -> dict[str, object]:
    return {
        str(p.relative_to(folder)): pq.read_table(p).to_pylist()
        if p.suffix == ".parquet"
        else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("export.json", LOCK_NAME)
    }


def test_copies_of_an_earlier_attempt_are_not_read_again(
    loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_card(*args: object) -> None:
        raise Killed

    dest = tmp_path / "out"
    monkeypatch.setattr(ExportPlace, "finish", no_card)
    with pytest.raises(Killed):
        export_to(loose, dest, "yolo", "copy")
    monkeypatch.undo()
    for path in (tmp_path / "source").rglob("*.*"):
        path.unlink()
    summary = export_to(loose, dest, "yolo", "copy")
    assert (summary.images, summary.copied_before, summary.left_out) == (4, 4, 0)
