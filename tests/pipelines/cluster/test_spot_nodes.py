"""Which instances are tried in which order; the roles' policies, as far as AWS's model goes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cluster.spot_nodes import choices

ROOT = Path(__file__).resolve().parents[3]
REGION = "us-east-1"


def test_without_otherwise_there_is_one_choice() -> None:
    assert list(choices({"InstanceType": "a"})) == [({"InstanceType": "a"}, None)]


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers()),
    st.lists(st.dictionaries(st.sampled_from("abcd"), st.none() | st.integers()), max_size=4),
)
def test_each_choice_is_the_first_one_changed(
    first: dict[str, int], changes: list[dict[str, int | None]]
) -> None:
    node_config = {**first, "Otherwise": [{**change, "AtMost": 7} for change in changes]}
    before = copy.deepcopy(node_config)
    one, *others = choices(node_config)
    assert node_config == before
    assert one == (first, None)
    for (got, at_most), change in zip(others, changes, strict=True):
        assert at_most == 7
        assert got == {k: v for k, v in {**first, **change}.items() if v is not None}


@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_roles_name_actions_that_exist(role: str) -> None:
    policy = json.loads((ROOT / f"deploy/aws/{role}-role.json").read_text())
    known = {
        service: set(boto3.client(service, REGION).meta.service_model.operation_names)
        for service in ("ec2", "ssm")
    }
    known["s3"] = {"ListBucket", "GetObject", "PutObject", "DeleteObject"}  # of IAM, not of the API
    known["iam"] = {"PassRole"}
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            service, name = action.split(":")
            assert name in known[service], action
        buckets = [r for r in statement["Resource"] if ":s3:" in r]
        assert all("*" not in r.split(":")[5].split("/")[0] for r in buckets), "one bucket"
