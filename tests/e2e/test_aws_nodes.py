"""ray_cluster.yaml's nodes on a real EC2 API (moto's), through Ray's own bootstrap of AWS clusters:
spot of each type, then on demand, private, with roles; and what EC2 refuses.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.awsrequest import AWSResponse
from moto import mock_aws
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
)

from pipelines.cluster.spot_nodes import SpotFirstNodeProvider, choices

ROOT = Path(__file__).resolve().parent.parent.parent
REGION = "us-east-1"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ec2(s3_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An AWS account in memory. Of several instances asked for it grants one, as EC2 may."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        # Ray writes the key pair it makes to ~/.ssh.
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        yield boto3.client("ec2", region_name=REGION)


@pytest.fixture(scope="module")
def cluster(ec2: Any) -> dict[str, Any]:
    """ray_cluster.yaml with the account's own subnets, group and image, as Ray bootstraps it."""
    text = (ROOT / "ray_cluster.yaml").read_text()
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    for number, subnet in enumerate(sorted(set(re.findall(r"subnet-\w{17}", text)))):
        made = ec2.create_subnet(
            VpcId=vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=f"{REGION}{'abc'[number]}"
        )
        text = text.replace(subnet, made["Subnet"]["SubnetId"])
    group = ec2.create_security_group(GroupName="labelfleet", Description="x", VpcId=vpc)
    text = re.sub(r"sg-\w{17}", group["GroupId"], text)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    text = re.sub(r'"resolve:ssm:[^"]+"', image, text)
    iam = boto3.client("iam", region_name=REGION)
    for role in ("head", "worker"):
        iam.create_instance_profile(InstanceProfileName=f"labelfleet-{role}")
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    bootstrapped = SpotFirstNodeProvider.bootstrap_config(config)
    assert isinstance(bootstrapped, dict)
    return bootstrapped


Start = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def provider(ec2: Any, cluster: dict[str, Any]) -> SpotFirstNodeProvider:
    """Of a cluster without any node."""
    for group in ec2.describe_instances()["Reservations"]:
        ec2.terminate_instances(InstanceIds=[i["InstanceId"] for i in group["Instances"]])
    return SpotFirstNodeProvider(cluster["provider"], cluster["cluster_name"])


@pytest.fixture
def start(ec2: Any, cluster: dict[str, Any], provider: SpotFirstNodeProvider) -> Start:
    def started(kind: str, count: int = 1) -> list[dict[str, Any]]:
        head = kind == cluster["head_node_type"]
        tags = {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD if head else NODE_KIND_WORKER,
            TAG_RAY_LAUNCH_CONFIG: "x",
        }
        node_config = cluster["available_node_types"][kind]["node_config"]
        made = provider.create_node(copy.deepcopy(node_config), tags, count)
        found = ec2.describe_instances(InstanceIds=list(made))["Reservations"]
        return [instance for group in found for instance in group["Instances"]]

    return started


Refuse = Callable[[dict[str, str]], str]


@pytest.fixture
def none_left(provider: SpotFirstNodeProvider) -> Iterator[Callable[[Refuse], None]]:
    """EC2 answers RunInstances with the error code that is given for it; '' lets it through."""
    rules: list[Refuse] = []

    def answer(params: dict[str, Any], **_: Any) -> tuple[AWSResponse, dict[str, Any]] | None:
        code = rules[-1](params["body"]) if rules else ""
        if not code:
            return None
        error = {"Error": {"Code": code, "Message": "there is none"}, "ResponseMetadata": {}}
        return AWSResponse("https://ec2", 500, {}, None), error

    events = provider.ec2_fail_fast.meta.client.meta.events  # Ray keeps one for the process
    events.register("before-call.ec2.RunInstances", answer)
    yield rules.append
    events.unregister("before-call.ec2.RunInstances", answer)


def is_spot(body: dict[str, str]) -> bool:
    return body.get("InstanceMarketOptions.MarketType") == "spot"


def test_the_head_is_small_on_demand_private_and_gives_no_cpu(
    cluster: dict[str, Any], start: Start
) -> None:
    [head] = start("head")
    assert cluster["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert "GPU" not in cluster["available_node_types"]["head"]["resources"]
    assert "InstanceLifecycle" not in head
    assert "PublicIpAddress" not in head
    assert head["IamInstanceProfile"]["Arn"].endswith("/labelfleet-head")


def test_every_choice_has_the_shape_that_ray_is_told(ec2: Any, cluster: dict[str, Any]) -> None:
    worker = cluster["available_node_types"]["gpu"]
    kinds = {description["InstanceType"] for description, _ in choices(worker["node_config"])}
    assert len(kinds) == 3
    found = ec2.describe_instance_types(InstanceTypes=sorted(kinds))["InstanceTypes"]
    assert {kind["InstanceType"] for kind in found} == kinds
    for kind in found:
        assert kind["VCpuInfo"]["DefaultVCpus"] == worker["resources"]["CPU"]
        assert sum(gpu["Count"] for gpu in kind["GpuInfo"]["Gpus"]) == worker["resources"]["GPU"]
        assert kind["InstanceStorageInfo"]["NvmeSupport"] == "required"


def test_a_worker_is_spot_private_with_a_role_and_imdsv2(ec2: Any, start: Start) -> None:
    [worker] = start("gpu")
    assert worker["InstanceLifecycle"] == "spot"
    assert worker["InstanceType"] == "g6.2xlarge"
    assert "PublicIpAddress" not in worker
    assert worker["IamInstanceProfile"]["Arn"].endswith("/labelfleet-worker")
    assert worker["MetadataOptions"]["HttpTokens"] == "required"
    [disk] = worker["BlockDeviceMappings"]
    volume = ec2.describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"][0]
    assert volume["Encrypted"]
    assert volume["VolumeType"] == "gp3"


def test_a_type_not_offered_anywhere_is_skipped(
    none_left: Callable[[Refuse], None], start: Start
) -> None:
    asked: list[tuple[str, str]] = []

    def refuse(body: dict[str, str]) -> str:
        asked.append((body["InstanceType"], body["SubnetId"]))
        return "" if body["InstanceType"] == "g4dn.2xlarge" else "InsufficientInstanceCapacity"

    none_left(refuse)
    [worker] = start("gpu")
    assert (worker["InstanceType"], worker["InstanceLifecycle"]) == ("g4dn.2xlarge", "spot")
    for refused in ("g6.2xlarge", "g5.2xlarge"):  # in every zone, before the next type
        assert len({subnet for kind, subnet in asked if kind == refused}) == 3


def test_without_any_spot_a_few_run_on_demand_and_no_more(
    none_left: Callable[[Refuse], None], start: Start
) -> None:
    none_left(lambda body: "InsufficientInstanceCapacity" if is_spot(body) else "")
    for _ in range(4):
        [worker] = start("gpu")
        assert worker["InstanceType"] == "g6.2xlarge"
        assert "InstanceLifecycle" not in worker
    with pytest.raises(NodeLaunchException):  # AtMost: 4
        start("gpu")


def test_spot_workers_do_not_count_as_on_demand(
    none_left: Callable[[Refuse], None], start: Start
) -> None:
    assert len(start("gpu") + start("gpu") + start("gpu") + start("gpu")) == 4
    none_left(lambda body: "InsufficientInstanceCapacity" if is_spot(body) else "")
    [worker] = start("gpu")
    assert "InstanceLifecycle" not in worker


def test_what_is_missing_of_one_type_comes_from_the_next(start: Start) -> None:
    assert sorted(w["InstanceType"] for w in start("gpu", 3)) == [
        "g4dn.2xlarge", "g5.2xlarge", "g6.2xlarge",
    ]  # fmt: skip


def test_a_refusal_for_another_reason_is_seen_at_once(
    none_left: Callable[[Refuse], None], start: Start
) -> None:
    none_left(lambda body: "UnauthorizedOperation")
    with pytest.raises(NodeLaunchException, match="UnauthorizedOperation"):
        start("gpu", 1)
