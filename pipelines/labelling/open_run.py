"""From a config to a run at its output: check what can be checked before a worker starts."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

from pipelines.config.files import check_files
from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_drop, check_places, group_shards, listed_objects
from pipelines.models.requested import existing_record, recorded_model, requested_by
from pipelines.truth import coco_classes as coco
from storage.errors import BelowTheMark, ConfigError, ModelError, StorageError
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore
from storage.records import RunIdentity, Shard, StoredObject
from storage.runs.listing import Listing
from storage.runs.listing_changes import ListingChange
from storage.runs.manifest import Manifest, RunRecord, config_hash, refuse_mismatch
from storage.shards.frames import FRAMES_KEY
from storage.shards.selecting import LeftOut
from storage.stores.open import open_store
from storage.urls import normalise_url, shown_url
from workers.checkpoints.lineage import carried_licence
from workers.spec import INFERENCE_VERSION, ArtefactRef, ModelSpec

log = logging.getLogger("labelfleet")


@dataclass(frozen=True, slots=True)
class OpenRun:
    """An existing run, and what its workers must load."""

    manifest: Manifest
    source: ObjectStore
    model: ModelSpec


def open_run(config: RunConfig, *, cuda: bool, note: Callable[[str], None] = log.info) -> OpenRun:
    """Create the run, or continue the existing one.

    Args:
        config: what is asked for.
        cuda: whether the workers have GPUs; fixed when the run is created.
        note: told of each step that makes the model ready, in a line for people.

    Raises:
        LabelfleetError: the run cannot work; raised before any worker is started.
    """
    check_places(config)
    check_files(config)
    next(iter(listed_objects(config)))  # create nothing for a missing source
    options = config.storage.options()
    output = open_store(config.output, options)
    existing = existing_record(output)
    model = requested_by(config, existing, output, cuda)
    if existing is None:
        _check_output(output)
        model = _made_ready(config, model, note)
        _pass_gate(config, model, note)
    elif config.gate is not None:
        note("gate: this run was created before; `labelfleet gate` measures its model again")
    for remark in model.remarks:
        note(f"note: {remark}")
    manifest = Manifest.create_or_continue(output, _record(config, model))
    _refuse_half_moved(manifest)
    return OpenRun(manifest, open_store(config.source.url, options), model)


def refuse_other_run(config: RunConfig, manifest: Manifest) -> None:
    """Refuse what ``open_run`` refuses of a run that exists, and write nothing.

    Raises:
        RunMismatch: the output holds a run of another source, model or setting.
        LabelfleetError: the model cannot be used, or the run's source is half moved.
    """
    model = recorded_model(config, manifest.record, manifest.store)
    refuse_mismatch(manifest.url, manifest.record, _record(config, model))
    _refuse_half_moved(manifest)


def _refuse_half_moved(manifest: Manifest) -> None:
    place = Listing(manifest.store).place()
    if place is not None and place != manifest.record.source["url"]:
        again = shlex.join(["labelfleet", "relocate", shown_url(manifest.url), shown_url(place)])
        raise ConfigError(
            f"the move of the source to {shown_url(place)} was interrupted",
            hint=f"finish it: {again}",
        )


def _check_output(output: ObjectStore) -> None:
    try:
        check_output(output)
    except StorageError as exc:
        hint = exc.hint or "check `output`, and who may write there"
        raise type(exc)(f"the output cannot be used: {exc.message}", hint=hint) from exc


def _pass_gate(config: RunConfig, model: ModelSpec, note: Callable[[str], None]) -> None:
    """Refuse a model below the mark before the run exists, so that its config can be fixed."""
    if config.gate is None:
        return
    from pipelines.models.gate_trials import measure_gate  # torch, and more

    result = measure_gate(config, model, config.gate.truth, config.gate.min_map, note)
    if not result.passed:
        raise BelowTheMark(f"gate: {result.verdict}", hint=result.advice)
    note(f"gate: {result.verdict}")


def refresh_listing(
    run: OpenRun,
    config: RunConfig,
    found: Callable[[Shard], None] = lambda shard: None,
    guard: Callable[[], None] = lambda: None,
    again: Container[str] = frozenset(),
) -> tuple[Listing, ListingChange]:
    """List the source again and append what is new, changed or gone.

    Args:
        found: called with every new shard, while the listing goes on.
        guard: called before the listing is committed; raises when the run's lock was lost.
        again: keys of objects to be labelled again, see ``Listing.refresh``.
    """
    listing = Listing(run.manifest.store)

    def group(objects: Iterable[StoredObject]) -> Iterator[Shard]:
        for shard in group_shards(objects, config.source.shard_size):
            found(shard)
            yield shard

    left_out = LeftOut()
    change = listing.refresh(
        listed_objects(config, left_out),
        group,
        guard,
        check_drop=partial(check_drop, config),
        again=again,
    )
    run.manifest.note_left_out(left_out.counts)
    return listing, change


def _made_ready(config: RunConfig, model: ModelSpec, note: Callable[[str], None]) -> ModelSpec:
    """Return the model with its artefact, or on torch where the one `runtime: auto` chose fails."""
    from pipelines.models.artefact import with_artefact  # torch, and more

    try:
        return with_artefact(config, model, say=note)
    except ModelError as exc:
        if config.model.runtime != "auto" or model.precision == "int8" or model.convention:
            raise
        note(f"{model.runtime} does not work here, so torch is used: {exc.message}")
        return replace(model, runtime="torch")


def _artefact_settings(ref: ArtefactRef, output: str) -> dict[str, str]:
    """Name the artefact by key where it lies below the output: the run can then be moved."""
    inside = ref.url.removeprefix(f"{output}/")
    place = {"url": ref.url} if inside == ref.url else {"key": inside}
    return {**place, "sha256": ref.sha256}


def inference_settings(config: RunConfig, model: ModelSpec) -> dict[str, Any]:
    """Return every setting that changes a box or a status; the place of the weights does not."""
    settings = asdict(model)
    settings.pop("checkpoint")
    settings.pop("artefact")
    settings.pop("official_ids")  # they name boxes, and move none
    settings.pop("remarks")
    settings["preprocessing"] = model.preprocessing.fields()
    if model.convention is None:
        settings.pop("convention")
    if model.tiles is None:
        settings.pop("tiles")
    if model.view is None:
        settings.pop("view")
    if model.artefact is not None:
        output = open_store(config.output, config.storage.options())
        settings["artefact"] = _artefact_settings(model.artefact, output.url)
    settings["inference_version"] = INFERENCE_VERSION
    settings["max_pixels"] = config.max_pixels
    settings["max_image_bytes"] = config.max_image_bytes
    if config.source.frames == "all":
        settings[FRAMES_KEY] = config.source.max_frames
    return settings


def _record(config: RunConfig, model: ModelSpec) -> RunRecord:
    inference = inference_settings(config, model)
    identity = RunIdentity(
        name=config.name,
        config_hash=config_hash(inference),
        model_sha256=model.sha256,
        licence=carried_licence(config.model.licence, model.licence, model.checkpoint),
        runtime=model.runtime,
        precision=model.precision,
        code_version=version("labelfleet"),
        categories=coco.categories_for(model.classes, model.official_ids),
    )
    source = {
        "url": normalise_url(config.source.url),
        "kind": config.source.kind,
        "include": list(config.source.include),
        "exclude": list(config.source.exclude),
        "shard_size": config.source.shard_size,
    }
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    return RunRecord(identity, source, inference, created_at, remarks=model.remarks)
