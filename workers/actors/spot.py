"""Spot notices: the two-minute warning that AWS gives before it reclaims an instance.

The notice stands in the instance's own metadata (IMDSv2: a token by PUT, then
``/latest/meta-data/spot/instance-action``, which is 404 until there is one:
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html).
Outside EC2 no request is sent and no thread runs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx

EC2_METADATA_URL = "http://169.254.169.254"
_POLL_S = 5.0
_TOKEN_S = 21_600  # six hours, the maximum
_WARNING_S = 120.0
_SILENT_TRIES = 3
_SILENT_POLL_S = 300.0  # in a container that the metadata service does not answer


@dataclass(frozen=True, slots=True)
class SpotNotice:
    """A notice that the node will be reclaimed.

    Attributes:
        action: terminate, stop or hibernate.
        within_s: seconds that were left when it was seen, 0 to 120.
    """

    action: str
    within_s: float


def metadata_url(environment: Mapping[str, str], dmi: Path = Path("/sys/class/dmi/id")) -> str:
    """Return the URL of this machine's metadata service; empty outside EC2.

    ``AWS_EC2_METADATA_SERVICE_ENDPOINT`` and ``AWS_EC2_METADATA_DISABLED`` mean what they mean to
    the AWS SDKs.
    """
    if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return ""
    if named := environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return named.rstrip("/")
    try:
        vendor = (dmi / "sys_vendor").read_text()
    except OSError:
        return ""
    return EC2_METADATA_URL if "amazon" in vendor.lower() else ""


class SpotWatch:
    """Polls for a notice every few seconds, in a daemon thread that ends with the first one.

    Args:
        url: of the metadata service; empty: nothing is ever asked.
        poll_s: seconds between two questions.
        wall: seconds since the epoch, to compare the notice's time with.
    """

    def __init__(
        self, url: str, *, poll_s: float = _POLL_S, wall: Callable[[], float] = time.time
    ) -> None:
        self._url, self._poll_s, self._wall = url, poll_s, wall
        self._notice: SpotNotice | None = None
        self._closed = threading.Event()
        if url:
            threading.Thread(target=self._watch, daemon=True, name="spot notices").start()

    @property
    def notice(self) -> SpotNotice | None:
        """Return the notice, once there is one."""
        return self._notice

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        silent = 0
        # No proxy from the environment: the metadata service is this machine's own.
        with httpx.Client(base_url=self._url, timeout=2, trust_env=False) as client:
            token = ""
            while self._notice is None:
                try:
                    token, self._notice = self._ask(client, token)
                    silent = 0
                except (httpx.HTTPError, ValueError):
                    silent += 1
                if self._closed.wait(_SILENT_POLL_S if silent >= _SILENT_TRIES else self._poll_s):
                    return

    def _ask(self, client: httpx.Client, token: str) -> tuple[str, SpotNotice | None]:
        """Return the token to use from now on, and the notice if there is one."""
        if not token:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
            token = client.put("/latest/api/token", headers=lifetime).raise_for_status().text
        reply = client.get(
            "/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
        )
        if reply.status_code == httpx.codes.UNAUTHORIZED:
            return "", None  # expired: get another one next time
        if reply.status_code == httpx.codes.NOT_FOUND:
            return token, None
        return token, self._read(reply.raise_for_status().text)

    def _read(self, body: str) -> SpotNotice:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError(f"no notice: {body[:80]!r}")
        try:
            at = datetime.fromisoformat(str(fields.get("time"))).timestamp()
        except ValueError:
            at = self._wall() + _WARNING_S
        # The bounds also hold if one of the two clocks is wrong.
        within_s = min(max(at - self._wall(), 0.0), _WARNING_S)
        return SpotNotice(str(fields.get("action", "terminate")), within_s)


def watch_this_machine() -> SpotWatch:
    """Return a watch that polls on EC2 and does nothing elsewhere."""
    return SpotWatch(metadata_url(os.environ))
