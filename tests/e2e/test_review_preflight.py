"""Images through S3, and what a push says before it pushes where something cannot work."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import httpx
import numpy as np
import pytest
from PIL import Image

from pipelines.label_studio.client import LabelStudio
from pipelines.label_studio.connect import open_server
from pipelines.label_studio.http import LabelStudioHttp
from pipelines.label_studio.serving import KEY_ID, SECRET, choose_serving
from pipelines.label_studio.token import VARIABLE, Token
from pipelines.review.copies import copy_images, existing, showable
from pipelines.review.pull import pull_run
from pipelines.review.push import push_run
from pipelines.review.tasks import queued
from storage.errors import ConfigError, ImageError, ReviewError
from storage.objects.protocols import StorageOptions
from storage.review.settings import ReviewSettings
from storage.runs.manifest import Manifest
from storage.shards.selecting import list_source, tar_shards
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.samples.review_samples import loose_run, picture, routed, three_boxes
from tests.support.samples.synthetic_run import make_run, row, tar_shard
from tests.support.servers.label_studio import LabelStudioServer
from tests.support.servers.s3 import S3Server

pytestmark = pytest.mark.slow


def s3_run(weed_s3: S3Server, count: int = 6) -> Manifest:
    bucket = weed_s3.fresh_bucket()
    source = open_store(f"s3://{bucket}/in", weed_s3.options)
    output = open_store(f"s3://{bucket}/runs/a b+c", weed_s3.options)
    return routed(loose_run(source, output, count))


def push(manifest: Manifest, weed_s3: S3Server, server: LabelStudio, title: str) -> list[bytes]:
    """Push over S3; returns what a task of each image shows."""
    source = open_store(manifest.record.source["url"], weed_s3.options)
    serving = choose_serving(manifest.store, weed_s3.options)
    settings = ReviewSettings(server.http.url, title)
    push_run(manifest, server, settings, source=source, serving=serving)
    project = server.find_project(title)
    assert project is not None
    tasks = server.tasks(project.project_id, include="id,data")
    # What the page is given: an address of Label Studio's own, not of the bucket.
    addresses = [task["data"]["image"] for task in tasks]
    assert all(address.startswith((server.http.url, "/tasks/")) for address in addresses)
    return [server.http.get_bytes(address) for address in addresses]


def test_images_on_s3_come_through_label_studio(
    weed_s3: S3Server, label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ID, weed_s3.access_key)
    monkeypatch.setenv(SECRET, weed_s3.secret_key)
    manifest, title = s3_run(weed_s3), f"s3 {uuid4().hex}"
    server = label_studio.client()
    shown = push(manifest, weed_s3, server, title)
    source = open_store(manifest.record.source["url"], weed_s3.options)
    by_id = [source.get(q.item.image_id) for q in queued(manifest)]
    assert shown == by_id
    project = server.find_project(title)
    assert project is not None
    (storage,) = server.storages(project.project_id, "s3")
    assert storage["presign"] is False
    assert weed_s3.secret_key not in json.dumps(storage)
    assert project.tasks == 6  # nothing was synchronised into tasks of its own
    monkeypatch.delenv(KEY_ID)  # the storage is there: no key is needed again
    assert len(push(manifest, weed_s3, server, title)) == 6
    assert pull_run(manifest, server, ReviewSettings(server.http.url, title)).answers == 0


def test_a_bucket_that_label_studio_may_not_read_is_said_before_any_task(
    weed_s3: S3Server, label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ID, weed_s3.access_key)
    monkeypatch.setenv(SECRET, "wrong")
    server, title = label_studio.client(), f"s3 {uuid4().hex}"
    with pytest.raises(ReviewError, match="cannot reach s3://") as caught:
        push(s3_run(weed_s3), weed_s3, server, title)
    assert KEY_ID in str(caught.value.hint)
    assert "wrong" not in str(caught.value)
    project = server.find_project(title)
    assert project is not None
    assert project.tasks == 0


def test_a_folder_that_label_studio_may_not_serve_is_said_before_any_task(
    tmp_path: Path, label_studio: LabelStudioServer
) -> None:
    source, output = open_store(str(tmp_path / "in")), open_store(str(tmp_path / "run"))
    manifest = routed(loose_run(source, output, 2))
    settings = ReviewSettings(label_studio.url, f"elsewhere {uuid4().hex}")
    with pytest.raises(ReviewError, match="LOCAL_FILES_DOCUMENT_ROOT") as caught:
        push_run(
            manifest, label_studio.client(), settings, source=source,
            serving=choose_serving(output, StorageOptions()),
        )  # fmt: skip
    assert f"DOCUMENT_ROOT={tmp_path}" in str(caught.value.hint)


def test_presigned_links_only_on_request_and_not_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory"):
        choose_serving(MemoryStore(), StorageOptions())
    with pytest.raises(ConfigError, match="1 to 7"):
        choose_serving(MemoryStore(), StorageOptions(), presign_days=8)


def test_a_personal_access_token_works_and_outlives_its_access_tokens(
    label_studio: LabelStudioServer,
) -> None:
    headers = {"Authorization": f"Token {label_studio.token}"}
    organisation = httpx.post(
        f"{label_studio.url}/api/jwt/settings", headers=headers, timeout=60,
        json={"api_tokens_enabled": True, "legacy_api_tokens_enabled": True,
              "api_token_ttl_days": 30},
    )  # fmt: skip
    organisation.raise_for_status()
    made = httpx.post(f"{label_studio.url}/api/token/", headers=headers, timeout=60)
    personal = made.json()["token"]
    http = LabelStudioHttp(label_studio.url, Token(personal))
    assert http._token.kind == "personal"
    assert LabelStudio(http).me()["email"] == label_studio.email
    http._token._access = _expired()  # as after five minutes
    assert LabelStudio(http).me()["email"] == label_studio.email
    assert personal not in repr(http._token)


def _expired() -> str:
    def part(fields: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")

    head, claims = {"alg": "HS256", "typ": "JWT"}, {"token_type": "access", "exp": 1, "user_id": 1}
    return f"{part(head)}.{part(claims)}.c2ln"


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "is not set"),
        ("hello", "holds no token"),
        ("cd" * 20, "Invalid token"),
        ("ey.e30.x", "holds no token"),
    ],
)
def test_a_wrong_token_is_said_in_words(
    token: str, said: str, label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, token)
    with (
        pytest.raises((ConfigError, ReviewError), match=said) as caught,
        open_server(label_studio.url),
    ):
        pass
    assert caught.value.hint
    assert not token or token not in str(caught.value)


def test_an_address_where_something_else_answers_is_said(
    weed_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "cd" * 20)
    with pytest.raises(ReviewError), open_server(weed_s3.endpoint_url):
        pass
    with pytest.raises(ConfigError, match="web address"), open_server("ftp://somewhere"):
        pass


def test_what_a_browser_would_not_show_upright_is_written_anew() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:10] = (255, 0, 0)
    for kind, orientation, suffix in (
        ("TIFF", 1, "png"), ("PNG", 6, "png"), ("PNG", 1, "png"), ("WebP", 6, "png"),
        ("WebP", 1, "webp"), ("JPEG", 6, "jpg"),
    ):  # fmt: skip
        out = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(out, kind, exif=exif)
        raw = out.getvalue()
        item = queued(routed(_one_image(raw)))[0].item
        name, shown = showable(item, raw)
        assert name == f"{item.sha256}.{suffix}"
        if orientation == 6 and kind != "JPEG":
            with Image.open(io.BytesIO(shown)) as image:
                assert image.size == (40, 60)
                assert image.getexif().get(0x0112, 1) == 1
        elif kind != "TIFF":
            assert shown == raw
        with pytest.raises(ImageError, match="not those that were labelled"):
            showable(item, raw + b"x")


def _one_image(raw: bytes) -> Manifest:
    shard = tar_shard("a.tar")
    made = replace(row("a.tar/a", shard.shard_id, three_boxes(0)),
                   sha256=hashlib.sha256(raw).hexdigest())  # fmt: skip
    return make_run(MemoryStore(), {shard: [made]})


def test_a_compressed_tar_is_read_once_for_all_its_images(tmp_path: Path) -> None:
    pictures = {f"{i}.jpg": picture([(10, 10, 50, 50)], seed=i) for i in range(8)}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, raw in pictures.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    source = MemoryStore()
    source.put("a.tar.gz", packed.getvalue())
    (shard,) = tar_shards(list_source(source))
    rows = [
        replace(
            row(f"a.tar.gz/{name}", shard.shard_id, three_boxes(i), offset=None, nbytes=len(raw)),
            sha256=hashlib.sha256(raw).hexdigest(), phash=i,
        )
        for i, (name, raw) in enumerate(pictures.items())
    ]  # fmt: skip
    manifest = routed(make_run(MemoryStore(), {shard: rows}))
    counted = _Counting(source)
    copies = copy_images(manifest, counted, [q.item for q in queued(manifest)])  # type: ignore[arg-type]
    assert (copies.copied, copies.problems, counted.streams) == (8, {}, 1)
    shown = {manifest.store.get(f"review/images/{name}") for name in existing(manifest).values()}
    assert shown == set(pictures.values())
    again = copy_images(manifest, counted, [q.item for q in queued(manifest)])  # type: ignore[arg-type]
    assert (again.copied, counted.streams) == (0, 1)


class _Counting:
    """A store that counts how often an object is streamed."""

    def __init__(self, store: MemoryStore) -> None:
        self._store, self.streams = store, 0

    def stream(self, key: str, *, if_match: str | None = None) -> object:
        self.streams += 1
        return self._store.stream(key, if_match=if_match)
