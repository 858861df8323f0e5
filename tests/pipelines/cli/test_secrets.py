"""Canary secrets wherever real ones may be; then messages, logs, tracebacks, the run are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.cli.main import main
from storage.stores.open import open_store
from tests.support.samples.synthetic_run import image_shard, make_run, row
from tests.support.samples.tiny_run import run_fields

SECRET_KEY = "canary/secret+key0001"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIDCANARY",
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_SESSION_TOKEN": "canary-session-0002",
    "LABEL_STUDIO_API_KEY": "ca" * 18 + "0003",  # looks like a legacy token
    "LABEL_STUDIO_S3_SECRET_ACCESS_KEY": "canary-reviewers-0004",
    "DATABASE_PASSWORD": "canary-environment-0005",
}
SIGNATURE, HOOK = "canary-signature-0006", "canary-hook-0007"
CANARIES = (*ENVIRONMENT.values(), SIGNATURE, HOOK, "canary%2Fsecret")
WEB = "http://127.0.0.1:1"  # no server listens there

ENDS: dict[str, tuple[str, ...]] = {
    "a report": ("report", "OUT"),
    "review without a server": ("review", "push", "OUT", "--url", WEB),
    "a password in a URL": ("status", f"s3://AKID:{SECRET_KEY}@bucket/x"),
    "a password in an endpoint": (
        "status", "s3://bucket/x", "--endpoint-url", f"http://me:{SECRET_KEY}@127.0.0.1:1",
    ),
    "a password in review's URL": ("review", "push", "OUT", "--url", f"http://me:{HOOK}@h:1"),
    "a bucket that is not there": ("plan", "CONFIG", "--set", "source.url=s3://not-there/x"),
    "a signed URL that is gone": (
        "run", "CONFIG", "--set", "output=OTHER",
        "--set", f"model.checkpoint={WEB}/gone.pth?Signature={SIGNATURE}",
    ),
    "a webhook on the command line": ("plan", "CONFIG", "--set", f"notify=https://h/{HOOK}"),
    "a webhook in a config that is refused": ("plan", "CONFIG", "--set", "name=a b"),
}  # fmt: skip


def canaries_in(text: str) -> set[str]:
    return {canary for canary in CANARIES if canary in text}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shard = image_shard("1.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jpg").write_bytes(b"x")
    rows = {shard: [row("1.jpg", shard.shard_id)]}
    make_run(open_store(str(tmp_path / "out")), rows, source=str(tmp_path / "in"))
    fields = run_fields(
        tmp_path / "in", tmp_path / "other", tmp_path / "nowhere.pth",
        model={"checkpoint": f"{WEB}/x.pth?X-Amz-Signature={SIGNATURE}"},
        storage={"endpoint_url": WEB, "attempts": 1, "region": "us-east-1"},
        notify=f"{WEB}/hooks/{HOOK}",
    )  # fmt: skip
    (tmp_path / "cells.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_no_secret_in_messages_logs_and_tracebacks(
    scene: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"OUT": scene / "out", "OTHER": scene / "other", "CONFIG": scene / "cells.yaml"}
    arguments = list(ENDS[name])
    for word, place in places.items():
        arguments = [a.replace(word, str(place)) for a in arguments]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--debug", "--json"])
    said = capsys.readouterr()
    assert (ended.value.code == 0) == (name == "a report"), said.err
    assert name == "a report" or "Traceback" in said.err
    assert canaries_in(said.out + said.err) == set()
    for folder in ("out", "other"):
        for file in (p for p in (scene / folder).rglob("*") if p.is_file()):
            assert canaries_in(file.read_bytes().decode("latin-1")) == set(), file


def test_the_search_would_find_them(scene: Path) -> None:
    assert canaries_in((scene / "cells.yaml").read_text()) == {SIGNATURE, HOOK}
