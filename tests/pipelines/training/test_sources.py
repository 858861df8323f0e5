"""The sources of a training: label versions and COCO sets with one list of classes, or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.labels.decide import decide_run
from pipelines.policy.policy import ClassThresholds, Policy
from pipelines.training.config import TrainConfig, load_train_config
from pipelines.training.sources import label_digests, pinned, read_data, silent_sources
from pipelines.training.stages import marked_stages
from storage.errors import ConfigError, SourceEmpty, SourceError, StorageUnavailable
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.samples.label_version import CALIBRATED, fill_source, labelled
from tests.support.samples.labelled_run import label
from tests.support.samples.training_samples import box, write_coco
from workers.images.preprocessing import Preprocessing
from workers.training.batches import BatchSource, TrainingBatch
from workers.training.recipe.augmentation import Augmentation
from workers.training.samples import Mixture

DARK_AND_BRIGHT = [{"id": 5, "name": "bright"}, {"id": 9, "name": "dark"}]


@pytest.fixture
def run(tmp_path: Path) -> Manifest:
    """A labelled folder, whose classes are ``dark`` and ``bright``."""
    return labelled(open_store(str(tmp_path / "photos")), open_store(str(tmp_path / "run")))


@pytest.fixture
def coco(tmp_path: Path, run: Manifest) -> dict[str, str]:
    """Three images with the same classes in another order."""
    boxes = [box(n, category, 4, 4, 20, 20) for n, category in ((1, 5), (2, 9), (3, 9))]
    path = write_coco(tmp_path / "coco", [(40, 40)] * 3, boxes, categories=DARK_AND_BRIGHT)
    return {"annotations": str(path), "images": str(path.parent)}


def config_of(tmp_path: Path, coco: dict[str, str], train: Any, **more: Any) -> TrainConfig:
    fields = {
        "name": "x", "output": str(tmp_path / "model"), "train": train, "val": coco, "steps": 4,
        "cache": {"dir": str(tmp_path / "cache"), "size": "1MB"}, **more,
    }  # fmt: skip
    return TrainConfig.model_validate(fields)


def labels(run: Manifest, **more: Any) -> dict[str, Any]:
    return {"labels": run.url, **more}


def test_sources_are_mixed_by_share_with_the_classes_of_the_first(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    sources = [labels(run, share=0.75), {**coco, "share": 0.25}]
    data = read_data(config_of(tmp_path, coco, sources))
    assert isinstance(data.train, Mixture)
    assert data.train.classes == ("dark", "bright")
    assert data.train.official_ids == (1, 2)
    assert len(data.train) == 10 + 3
    assert data.train.shares == (0.75, 0.25)
    # Of the COCO set image 1 is bright, 2 and 3 are dark; so are they in val.
    assert [int(data.train.sample(10 + n).labels[0]) for n in range(3)] == [1, 0, 0]
    assert [int(image.labels[0]) for image in data.sets["val"].images] == [1, 0, 0]
    first, second = data.sources
    assert (first["version"], first["images"], first["images_by_people"]) == ("v0001", 10, 2)
    assert (second["images"], second["objects"], second["share"]) == (3, 3, 0.25)


def test_a_class_that_the_policy_knows_too_little_of_is_silent_unless_told_otherwise(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    """Of ``dark`` nothing is accepted; of ``bright`` 40 % of its objects are known."""
    classes = {"dark": {"accept": 1.0}, "bright": {"accept": 0.2, "known": 0.4}}
    decide_run(run, Policy.from_config({"reject": 0.1, "classes": classes}))

    def silent(**more: Any) -> tuple[object, list[int], str]:
        config = config_of(tmp_path, coco, labels(run, **more))
        data = read_data(config)
        told = data.train.sample(9).silent[:, 0].astype(int).tolist()
        assert silent_sources(data).keys() == ({data.sources[0]["source"]} if told else set())
        return data.sources[0].get("silent"), told, config.fingerprint(data=False)

    why, classes_there, by_default = silent()
    assert classes_there == [0, 1]
    assert why == {
        "dark": "the policy accepts no box of it",
        "bright": "labels and undecided boxes cover 40% of its objects, less than 50%",
    }
    assert silent(absence_from=0.5)[2] == by_default
    assert silent(absence_from=0.4)[1] == [0]
    why, classes_there, other = silent(absence_from=None)
    assert (why, classes_there) == (None, [])
    assert other != by_default
    # People's classes: a class that is renamed is silent under its new name.
    assert silent(classes={"dark": "bright", "bright": "dark"})[1] == [0, 1]


def test_one_label_version_alone_may_be_written_as_a_section(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    data = read_data(config_of(tmp_path, coco, labels(run)))
    assert len(data.train) == 10
    assert data.train.sample(9).pseudo


def batches(config: TrainConfig, first: int, end: int) -> list[TrainingBatch]:
    data = read_data(config)
    how = Preprocessing(size=(64, 64), resize_to=(60, 60))
    source = BatchSource(data.train, how, Augmentation(), 3, config.seed)
    return list(source.stream(first, end))


def test_a_stopped_training_gets_the_batches_that_would_have_followed(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    bright = ClassThresholds.model_validate({"known": 0.1})
    decide_run(run, CALIBRATED.model_copy(update={"classes": {"bright": bright}}))
    config = config_of(tmp_path, coco, [labels(run, share=0.5), {**coco, "share": 0.5}])
    whole = batches(config, 0, 9)
    later = batches(config, 5, 9)  # in the middle of a pass, with a cache that is filled now
    for a, b in zip(whole[5:], later, strict=True):
        for name in ("images", "targets", "ignore", "weights", "checked", "silent"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    weights = torch.cat([batch.weights for batch in whole])
    assert ((weights > 0.5) & (weights < 0.9)).any(), "the model's boxes"
    assert (weights == 1).any(), "people's"


def test_a_new_version_changes_the_fingerprint_and_a_named_one_does_not(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    latest = config_of(tmp_path, coco, labels(run))
    named = config_of(tmp_path, coco, labels(run, version="v0001"))
    before = [c.fingerprint(labels=label_digests(c)) for c in (latest, named)]
    other_cache = config_of(tmp_path, coco, labels(run), cache=None)
    assert other_cache.fingerprint(labels=label_digests(other_cache)) == before[0]
    decide_run(run, Policy(accept=0.2, reject=0.1))
    assert latest.fingerprint(labels=label_digests(latest)) != before[0]
    assert named.fingerprint(labels=label_digests(named)) == before[1]


def test_latest_is_looked_up_once_for_fingerprint_and_data(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    """A version that appears between the two is learned by the next training, not half by this."""
    config = config_of(tmp_path, coco, [labels(run, share=0.5), {**coco, "share": 0.5}])
    (stage,) = marked_stages(config)
    decide_run(run, Policy(accept=0.2, reject=0.1))
    assert [source.version for source in stage.config.sources] == ["v0001", "latest"]
    assert read_data(stage.config).sources[0]["version"] == "v0001"
    (later,) = marked_stages(config)
    assert later.config.sources[0].version == "v0002"
    assert later.fingerprint != stage.fingerprint
    # The data changed, not the config: --accept-data can go on.
    assert later.config_fingerprint == stage.config_fingerprint


def test_labels_are_read_from_the_stores_of_the_configs_storage(
    tmp_path: Path, coco: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint is the config's: here nothing answers, where AWS would refuse the name."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    storage = {"endpoint_url": "http://127.0.0.1:9", "attempts": 1, "connect_timeout_s": 1}
    config = config_of(tmp_path, coco, {"labels": "s3://plates/run"}, storage=storage)
    for read in (label_digests, pinned, read_data):
        with pytest.raises(StorageUnavailable, match=r"127\.0\.0\.1:9"):
            read(config)
    plain = config_of(tmp_path, coco, coco)
    assert plain.fingerprint() == config_of(tmp_path, coco, coco, storage=storage).fingerprint()


def test_a_version_or_a_run_that_does_not_exist_is_named_with_those_that_do(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="no label version 'v0007'") as caught:
        read_data(config_of(tmp_path, coco, labels(run, version="v0007")))
    assert "v0001" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="no run at"):
        label_digests(config_of(tmp_path, coco, {"labels": str(tmp_path / "nothing")}))


def test_classes_that_differ_name_both_sources_and_can_be_mapped(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    boxes = [box(1, 1, 4, 4, 20, 20), box(1, 2, 4, 4, 9, 9), box(1, 3, 1, 1, 9, 9)]
    categories = [{"id": n, "name": name} for n, name in enumerate(("night", "bright", "dust"), 1)]
    path = write_coco(tmp_path / "other", [(40, 40)], boxes, categories=categories)
    other = {"annotations": str(path), "images": str(path.parent)}
    with pytest.raises(ConfigError) as caught:
        read_data(config_of(tmp_path, coco, [labels(run), other]))
    for said in (str(path), f"{run.url} (latest)", "only", "dust, night", "dark"):
        assert said in caught.value.message
    with pytest.raises(ConfigError, match="no class smudge"):
        read_data(config_of(tmp_path, coco, [labels(run), {**other, "classes": {"smudge": None}}]))
    mapped = {**other, "classes": {"night": "dark", "dust": None}}
    data = read_data(config_of(tmp_path, coco, [labels(run), mapped]))
    sample = data.train.sample(10)
    assert sample.labels.tolist() == [0, 1]
    assert sample.ignore.tolist() == [[1, 1, 10, 10]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([{"labels": "r", "share": 0}], r"train\.0\.share: a number above 0 of at most 1 is"),
        ([{"labels": "r", "share": 0.5}, {"labels": "s"}], "give each of the sources a share"),
        ([{"labels": "r", "annotations": "a"}], r"train\.0: give either `labels`, or"),
        ([{"labels": "r", "verson": "v1"}], r"train\.0\.verson: unknown key; did you mean"),
        ([{"labels": "s3://key:secret@b"}], "credentials"),
        ([], "train: "),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(
    tmp_path: Path, coco: dict[str, str], train: Any, said: str
) -> None:
    import yaml

    path = tmp_path / "train.yaml"
    fields = {"name": "x", "output": "m", "val": coco, "steps": 1, "train": train}
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError, match=said) as caught:
        load_train_config(str(path))
    assert "secret" not in caught.value.message


def test_labels_without_a_box_and_images_that_changed_are_refused(
    tmp_path: Path, run: Manifest, coco: dict[str, str]
) -> None:
    ignored = {"dark": "bright", "bright": None}
    with pytest.raises(ConfigError, match="differ in their classes"):
        read_data(config_of(tmp_path, coco, labels(run, classes=ignored)))
    photo = tmp_path / "photos" / "loose" / "002.png"
    photo.write_bytes(photo.read_bytes() + b" ")
    with pytest.raises(SourceError, match=r"loose/002.png changed"):
        read_data(config_of(tmp_path, coco, labels(run)))
    source, output = open_store(str(tmp_path / "p2")), open_store(str(tmp_path / "r2"))
    fill_source(source)
    nothing = label(source, output)
    decide_run(nothing, Policy(accept=1.0, reject=1.0))
    with pytest.raises(SourceEmpty, match="no box to learn"):
        read_data(config_of(tmp_path, coco, labels(nothing)))
