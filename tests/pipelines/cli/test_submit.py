"""The command line of `labelfleet submit`."""

from __future__ import annotations

from pipelines.cli.submit import given


def test_the_command_that_attaches_again_is_of_the_same_run() -> None:
    words = given(["name=b", "output=s3://plates/b"], "http://head:8265", ["A=1"])
    assert words == [
        "--set", "name=b", "--set", "output=s3://plates/b",
        "--address", "http://head:8265", "--env", "A=1",
    ]  # fmt: skip
    assert given(None, None, None) == []
