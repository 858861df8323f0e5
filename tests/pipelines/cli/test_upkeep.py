"""verify and gc on the command line: codes, lines, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli.main import main
from storage.runs.manifest import annotation_key
from storage.stores.local import LocalStore
from tests.support.samples.synthetic_run import make_run, row, tar_shard

TARS = [tar_shard(f"{i}.tar") for i in range(2)]


@pytest.fixture
def out(tmp_path: Path) -> LocalStore:
    store = LocalStore(str(tmp_path / "out"))
    make_run(store, {t: [row(f"{t.key}/1.png", t.shard_id)] for t in TARS})
    return store


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, said.out, said.err


def test_verify_exits_0_on_a_clean_run_and_1_on_any_difference(
    out: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = call(capsys, "verify", out.url, "--complete")
    assert code == 0
    assert "clean" in said
    out.delete(annotation_key(TARS[0].shard_id))
    assert call(capsys, "verify", out.url)[0] == 0  # without a ledger it is work left
    code, said, _ = call(capsys, "verify", out.url, "--complete", "--json")
    assert code == 1
    fields = json.loads(said.splitlines()[-1])
    assert (fields["clean"], fields["found"], fields["left"]) == (False, 1, 1)
    assert fields["differences"][0]["shard_id"] == TARS[0].shard_id


def test_gc_says_what_and_how_many_bytes(
    out: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    out.put(f"writable-{'0' * 16}.probe", b"12345")
    code, said, _ = call(capsys, "gc", out.url)
    assert code == 0
    assert "0 objects" in said
    assert "1 more are left" in said
    for options in (["--dry-run"], []):
        code, said, _ = call(capsys, "gc", out.url, "--older-than", "0", "--json", *options)
        assert code == 0
        fields = json.loads(said.splitlines()[-1])
        assert fields["nbytes"] == 5
        assert [g["key"] for g in fields["garbage"]] == [f"writable-{'0' * 16}.probe"]
        assert fields["dry_run"] == bool(options)
    assert list(out.list("writable")) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["gc", "RUN", "--older-than", "soon"], "is not an age"), (["verify"], "RUN")],
)
def test_wrong_usage(
    out: LocalStore, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, _, err = call(capsys, *[out.url if a == "RUN" else a for a in arguments])
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("option", [["--log-format", "json"], ["--log-format=json"]])
def test_an_error_is_one_json_line_where_logs_are_json(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
) -> None:
    monkeypatch.setenv("LABELFLEET_LOG", "")
    code, _, err = call(capsys, "status", *option, tmp_path / "nowhere")
    assert code == 2
    (line,) = err.splitlines()
    said = json.loads(line)
    assert (said["level"], said["exit_code"]) == ("error", 2)
    assert "no run at" in said["message"]


def test_an_unknown_log_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "doctor", "--log-format", "xml")
    assert code == 2
    assert "text or json" in err
