"""How Label Studio reads the images, chosen from the output's URL.

    s3://   an S3 source storage without presigning: Label Studio itself fetches each image
    file:// a local-files storage: Label Studio reads the folder, so it runs on this machine
    any     presigned URLs, on request only: they expire, and anyone who has one sees the image

A storage is connected once and never synchronised (that takes 25 to 30 images a second, and makes
tasks of its own). Every way is tried with one image before any task is pushed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from pipelines.label_studio.client import LabelStudio
from pipelines.label_studio.errors import OutcomeUnknown, ReviewRefused
from storage.errors import ConfigError, LabelfleetError, ReviewError
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.review.queue import IMAGES
from storage.urls import parse_url, shown_url

KEY_ID, SECRET = "LABEL_STUDIO_S3_ACCESS_KEY_ID", "LABEL_STUDIO_S3_SECRET_ACCESS_KEY"
MAX_PRESIGN_DAYS = 7  # S3's own limit


class Serving(Protocol):
    """One way."""

    def connect(self, server: LabelStudio, project_id: int, name: str) -> None:
        """Give the project what it needs; ``name`` is an image that is there.

        Raises:
            ReviewError: it cannot work; the hint says what to do.
        """
        ...

    def url(self, name: str) -> str:
        """Return what a task's data says for the image of this file name."""
        ...


def choose_serving(
    store: ObjectStore, options: StorageOptions, *, presign_days: int | None = None
) -> Serving:
    """Return the way for an output. Raises ConfigError where none works."""
    if presign_days is not None:
        if not 1 <= presign_days <= MAX_PRESIGN_DAYS:
            raise ConfigError(f"presigned URLs for {presign_days} days", hint="give 1 to 7 days")
        return Presigned(store, presign_days * 86_400)
    place = parse_url(store.url)
    if place.scheme == "s3":
        return S3Proxied(place.authority, place.path, options)
    if place.scheme == "file":
        return LocalFiles(Path(place.path))
    raise ConfigError(
        f"Label Studio cannot be pointed at images below {store.url}",
        hint="push from an output on s3:// or in a local folder, or ask for --presigned DAYS",
    )


@dataclass(frozen=True, slots=True)
class S3Proxied:
    """Through Label Studio, whose S3 storage of the project knows how to reach the bucket."""

    bucket: str
    path: str
    options: StorageOptions

    @property
    def _prefix(self) -> str:
        return f"{self.path.strip('/')}/{IMAGES}".strip("/")

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{self._prefix}/{name}"

    def connect(self, server: LabelStudio, project_id: int, name: str) -> None:
        if not any(s["bucket"] == self.bucket for s in server.storages(project_id, "s3")):
            self._add(server, project_id)
        try:
            shown = server.image_bytes(project_id, self.url(name))
        except LabelfleetError as exc:
            raise ReviewError(
                f"Label Studio cannot fetch {self.url(name)}: {exc.message}",
                hint="look at the S3 storage in the project's Settings > Cloud Storage: its "
                "endpoint and credentials must reach the bucket from where Label Studio runs",
            ) from exc
        if not shown:
            raise ReviewError(f"Label Studio shows nothing for {self.url(name)}")

    def _add(self, server: LabelStudio, project_id: int) -> None:
        fields = {
            "title": "labelfleet review images", "bucket": self.bucket, "prefix": self._prefix,
            "presign": False, "use_blob_urls": True,
        }  # fmt: skip
        from storage.s3.client import endpoint_of  # boto3, which is slow to import

        endpoint = endpoint_of(self.options)
        if endpoint:
            fields["s3_endpoint"] = endpoint
        if self.options.region:
            fields["region_name"] = self.options.region
        if os.environ.get(KEY_ID):
            # Only credentials set aside for Label Studio, which stores them: never our own.
            fields["aws_access_key_id"] = os.environ[KEY_ID]
            fields["aws_secret_access_key"] = os.environ.get(SECRET, "")
        try:
            server.add_storage(project_id, "s3", **fields)
        except ReviewError as exc:
            raise ReviewError(
                f"Label Studio cannot reach s3://{self.bucket}: {_without_query(exc)}",
                hint=_mend_s3(exc.message, endpoint),
            ) from exc


def _mend_s3(said: str, endpoint: str | None) -> str:
    if "reserved network address" in said:
        return (
            f"its SSRF filter blocks the private address {shown_url(endpoint or '')}: start Label "
            "Studio with USE_DEFAULT_BANNED_SUBNETS=false if that network is yours"
        )
    return (
        f"let Label Studio's own environment reach the bucket, or set {KEY_ID} and {SECRET} here "
        "to a key that may list and read it (Label Studio keeps it), and push again"
    )


def _without_query(exc: LabelfleetError) -> str:
    return exc.message.split("?", 1)[0] if "Signature=" in exc.message else exc.message


@dataclass(slots=True)
class LocalFiles:
    """From the output's folder, below the document root that Label Studio was started with."""

    folder: Path
    _relative: str = ""

    @property
    def _images(self) -> Path:
        return self.folder / IMAGES.rstrip("/")

    def url(self, name: str) -> str:
        return f"/data/local-files/?d={quote(f'{self._relative}/{name}'.lstrip('/'))}"

    def connect(self, server: LabelStudio, project_id: int, name: str) -> None:
        there = server.storages(project_id, "localfiles")
        if not any(Path(s["path"]) == self._images for s in there):
            self._add(server, project_id)
        # The document root is the server's secret: the right one is that below which it finds
        # the image that we know to be there.
        wanted = (self._images / name).read_bytes()
        parts = self._images.parts
        for at in range(1, len(parts)):
            self._relative = "/".join(parts[at:])
            if _has(server, project_id, self.url(name), wanted):
                return
        raise ReviewError(
            f"Label Studio does not serve {self._images}",
            hint="it must run on this machine, and see the same folder; " + _MEND_LOCAL,
        )

    def _add(self, server: LabelStudio, project_id: int) -> None:
        try:
            server.add_storage(
                project_id, "localfiles", title="labelfleet review images",
                path=str(self._images), use_blob_urls=True,
            )  # fmt: skip
        except (ReviewRefused, OutcomeUnknown) as exc:
            raise ReviewError(
                f"Label Studio cannot serve {self._images}: {exc.message}",
                hint=_MEND_LOCAL.format(root=self.folder.parent),
            ) from exc


_MEND_LOCAL = (
    "start it with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and "
    "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root} (any folder above the output)"
)


def _has(server: LabelStudio, project_id: int, url: str, wanted: bytes) -> bool:
    try:
        return server.image_bytes(project_id, url) == wanted
    except ReviewError:
        return False  # not below this root


@dataclass(frozen=True, slots=True)
class Presigned:
    """Links that anyone can open until they expire; each push makes them anew."""

    store: ObjectStore
    expires_s: int

    def url(self, name: str) -> str:
        return self.store.presign(f"{IMAGES}{name}", expires_s=self.expires_s)

    def connect(self, server: LabelStudio, project_id: int, name: str) -> None:
        self.url(name)  # raises where the store has no such links
