"""Artefacts: found whole or not at all, fetched by digest, and named when they are not right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from storage.errors import ArtefactError
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_store
from workers.runtimes.artefacts import fetch_artefact, find, publish, read_facts
from workers.spec import ArtefactRef

OPTIONS = StorageOptions()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "made").mkdir()
    made = {name: tmp_path / "made" / name for name in ("model.xml", "model.bin")}
    for name, path in made.items():
        path.write_bytes(name.encode() * 100)
    return made


@pytest.fixture
def ref(tmp_path: Path, files: dict[str, Path]) -> ArtefactRef:
    return publish(open_store(str(tmp_path / "out")), "model/k", files, "model.xml", {"note": 1})


def test_what_was_published_is_fetched(ref: ArtefactRef, files: dict[str, Path]) -> None:
    found = fetch_artefact(ref, OPTIONS)
    assert (found.main, found.facts["note"]) == ("model.xml", 1)
    assert {name: path.read_bytes() for name, path in found.files.items()} == {
        name: path.read_bytes() for name, path in files.items()
    }


def test_the_first_of_two_makers_stays(
    ref: ArtefactRef, tmp_path: Path, files: dict[str, Path]
) -> None:
    store = open_store(str(tmp_path / "out"))
    files["model.bin"].write_bytes(b"another one")
    assert publish(store, "model/k", files, "model.xml", {"note": 2}) == ref
    assert find(store, "model/k") == ref
    assert find(store, "model/other") is None
    assert fetch_artefact(ref, OPTIONS).files["model.bin"].read_bytes() != b"another one"


def test_what_is_gone_or_another_is_said_in_words(ref: ArtefactRef, tmp_path: Path) -> None:
    (weights,) = (tmp_path / "out/model/k").glob("*.bin")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ArtefactError, match=r"not whole: .*has sha256"):
        fetch_artefact(ref, OPTIONS)
    weights.unlink()
    with pytest.raises(ArtefactError, match=r"not whole: there is nothing at .*\.bin"):
        fetch_artefact(ref, OPTIONS)
    with pytest.raises(ArtefactError, match="not the model artefact"):
        fetch_artefact(dataclasses.replace(ref, sha256="0" * 64), OPTIONS)
    (tmp_path / "out/model/k/artefact.json").unlink()
    with pytest.raises(ArtefactError, match="is gone"):
        fetch_artefact(ref, OPTIONS)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2},
        {"main": "absent"},
        {"main": []},
        {"files": []},
        {"files": {"a": {"object": "../a", "sha256": "0" * 64}}},
        {"files": {"a": {"object": "a", "sha256": "../../etc"}}},
    ],
)
def test_a_list_of_files_that_is_none_is_refused(changed: dict[str, object]) -> None:
    right = {"format": 1, "main": "a", "files": {"a": {"object": "a", "sha256": "0" * 64}}}
    assert read_facts(json.dumps(right).encode(), "url")["main"] == "a"
    with pytest.raises(ArtefactError, match="url is not a model artefact"):
        read_facts(json.dumps({**right, **changed}).encode(), "url")
