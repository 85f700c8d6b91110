"""`scripts/aws_account.py` against moto, without AWS.

These tests answer what moto does not implement: EC2's quotas, AWS's images, and refusals.
"""

import copy
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import yaml
from botocore import exceptions
from moto import mock_aws

from ray_detox.recipes.loading import load_config
from ray_detox.store.dynamodb import DynamoDBStore

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/aws_account.py"
tool = runpy.run_path(str(SCRIPT))
REGION, ACCOUNT = "us-east-1", "123456789012"
BUCKET = f"ray-detox-{ACCOUNT}-{REGION}"
ON_DYNAMODB = ["results.store=dynamodb", "results.table=ray-detox"]


class Answers:
    """A session whose requests moto answers, except those in `answers`."""

    def __init__(self):
        self.session = boto3.Session()
        self.asked = []
        self.owners = set()
        self.quotas = {"L-DB2E81BA": 32.0, "L-3819A6DF": 16.0, "L-1216C47A": 5.0}
        self.answers = {
            "service-quotas:GetServiceQuota": self._quota,
            "ssm:GetParameters": lambda _: {"Parameters": [], "InvalidParameters": []},
        }
        """By request: a function from its body to a reply, the code of a refusal, or an error."""
        self.session.events.register("before-call", self._before)

    def _quota(self, request):
        value = self.quotas.get(request["QuotaCode"])
        return "NoSuchResourceException" if value is None else {"Quota": {"Value": value}}

    def _before(self, model, params, **_):
        request = f"{model.service_model.service_name}:{model.name}"
        self.asked.append(request)
        if model.service_model.service_name == "s3":
            self.owners.add(params["headers"].get("x-amz-expected-bucket-owner"))
        if request not in self.answers:
            return None
        body = params["body"]
        said = self.answers[request](json.loads(body) if isinstance(body, bytes) and body else body)
        if isinstance(said, Exception):
            raise said
        if isinstance(said, str):
            headers = {"x-amz-bucket-region": "eu-central-1"}
            error = {"Error": {"Code": said, "Message": ""}}
            return SimpleNamespace(status_code=403), error | {
                "ResponseMetadata": {"HTTPHeaders": headers}
            }
        return SimpleNamespace(status_code=200), said


@pytest.fixture(scope="module")
def aws():
    """An emulated AWS of this process with profiles, bucket and table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        with mock_aws():
            # The resources of cluster/iam.yaml, created directly because moto's CloudFormation is slow.
            for kind in ("head", "worker"):
                iam = boto3.client("iam", REGION)
                iam.create_instance_profile(InstanceProfileName=f"ray-detox-{kind}")
            boto3.client("s3", REGION).create_bucket(Bucket=BUCKET)
            boto3.setup_default_session()
            DynamoDBStore("ray-detox", region=REGION).create_table()
            yield


@pytest.fixture
def account(aws):
    """An account that lacks nothing."""
    return Answers()


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster/aws.yaml").read_text("utf-8"))


def faults(account, cluster, *words):
    return tool["find_faults"](cluster, load_config("flan-t5-base", words), account.session)


def test_a_complete_account_has_no_fault_and_is_not_changed(account, cluster):
    assert faults(account, cluster, *ON_DYNAMODB) == []

    assert set(account.asked) == {
        "sts:GetCallerIdentity", "ec2:DescribeRegions", "ec2:DescribeInstanceTypeOfferings",
        "ec2:DescribeInstanceTypes", "service-quotas:GetServiceQuota", "ssm:GetParameters",
        "iam:GetInstanceProfile", "s3:HeadBucket", "dynamodb:DescribeTable", "ec2:RunInstances",
    }  # fmt: skip
    assert account.owners == {ACCOUNT}  # the name of the bucket can be guessed, and taken by others
    assert boto3.client("ec2", REGION).describe_instances()["Reservations"] == []  # a dry run


def test_all_faults_are_reported_together(account, cluster):
    account.quotas["L-3819A6DF"] = 0.0
    cluster["cluster_name"] = "other"
    types = cluster["available_node_types"]
    types["reward_gpu_spot"]["node_config"]["InstanceType"] = "g4dn.xlarg"
    types["train_gpu"]["node_config"]["IamInstanceProfile"] = {"Name": "other-worker"}

    found = faults(account, cluster, "results.store=dynamodb", "results.table=nowhere")

    assert [re.sub(r"[:.'].*", "", fault) for fault in found] == [
        "available_node_types", "The instance profile ", "There is no bucket ", "There is no table "
    ]  # fmt: skip
    assert "reward_gpu_spot: g4dn.xlarg is not offered in us-east-1." in found[0]
    assert "'other-worker' is not in account 123456789012. Deploy cluster/iam.yaml" in found[1]
    assert "'other-123456789012-us-east-1'" in found[2]
    assert "ray-detox table create results.table=nowhere results.region=us-east-1." in found[3]
    assert "ec2:RunInstances" not in account.asked


# ---- who and where ---------------------------------------------------------------------------


def test_an_unknown_region_is_named_before_any_request(account, cluster):
    cluster["provider"]["region"] = "eu-centrall-1"

    assert faults(account, cluster) == [
        "provider.region is 'eu-centrall-1', which AWS does not have; did you mean 'eu-central-1'?"
    ]
    assert account.asked == []


def test_a_region_that_is_not_enabled_is_not_taken_for_wrong_credentials(account, cluster):
    cluster["provider"]["region"] = "af-south-1"
    regions = [{"RegionName": "af-south-1", "OptInStatus": "not-opted-in"}]
    account.answers["ec2:DescribeRegions"] = lambda _: {"Regions": regions}

    (fault,) = faults(account, cluster)

    assert fault.startswith(f"af-south-1 is not enabled in account {ACCOUNT}. Enable it")


def test_missing_credentials_stop_all_further_requests(account, cluster, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    nobody = Answers()

    (fault,) = faults(nobody, cluster)

    assert fault.startswith("No AWS credentials were found, or they are incomplete. Sign in:")
    assert not [asked for asked in nobody.asked if not asked.startswith("sts:")]


@pytest.mark.parametrize("code", ["InvalidClientTokenId", "ExpiredToken", "SignatureDoesNotMatch"])
def test_refused_credentials_are_the_only_fault(account, cluster, code):
    account.answers["sts:GetCallerIdentity"] = lambda _: code

    assert faults(account, cluster) == [
        f"AWS refused the credentials ({code}). Sign in again: aws configure, or aws sso login."
    ]


def test_an_unreachable_aws_is_one_sentence(account, cluster):
    silence = exceptions.ConnectTimeoutError(endpoint_url="https://aws")
    account.answers["sts:GetCallerIdentity"] = lambda _: silence

    (fault,) = faults(account, cluster)

    assert fault.startswith("AWS could not be reached (ConnectTimeoutError).")


# ---- what may be started ---------------------------------------------------------------------


def test_quotas_are_compared_with_all_nodes_of_max_workers(account, cluster):
    account.quotas |= {"L-DB2E81BA": 24.0, "L-3819A6DF": 0.0}

    on_demand, spot = faults(account, cluster)

    assert on_demand == (
        "The quota 'Running On-Demand G and VT instances' (L-DB2E81BA) is 24 CPUs in us-east-1, and "
        "aws.yaml may start 32. Ask for 32 in Service Quotas (hours to days), or lower max_workers."
    )
    assert "(L-3819A6DF) is 0 CPUs in us-east-1, and aws.yaml may start 16." in spot


def test_spot_training_nodes_count_towards_the_spot_quota(account, cluster):
    for name in ("train_gpu_spot_g6", "train_gpu_spot_g5"):
        cluster["available_node_types"][name]["max_workers"] = 2

    (fault,) = faults(account, cluster)

    assert "(L-3819A6DF) is 16 CPUs in us-east-1, and aws.yaml may start 48." in fault


def test_a_quota_that_was_never_changed_has_the_default_value(account, cluster):
    del account.quotas["L-DB2E81BA"]
    account.answers["service-quotas:GetAWSDefaultServiceQuota"] = lambda _: {
        "Quota": {"Value": 0.0}
    }

    (fault,) = faults(account, cluster)

    assert "(L-DB2E81BA) is 0 CPUs" in fault


def test_an_image_missing_in_the_region_is_named(account, cluster):
    account.answers["ssm:GetParameters"] = lambda said: {"InvalidParameters": said["Names"]}

    (fault,) = faults(account, cluster)

    assert fault.startswith("ImageId leads to /aws/service/deeplearning/ami/x86_64/base-oss")
    assert "us-east-1 has no such parameter." in fault


@pytest.mark.parametrize(
    "code, sentence",
    [
        (
            "UnauthorizedOperation",
            "You may not RunInstances (UnauthorizedOperation). Add the permission",
        ),
        ("OptInRequired", "(OptInRequired): this account is not signed up for it"),
        ("PendingVerification", "(PendingVerification): AWS is still verifying this account"),
        ("VcpuLimitExceeded", "(VcpuLimitExceeded): the quota for on-demand CPUs is used up."),
        ("MaxSpotInstanceCountExceeded", "the quota for spot CPUs is used up."),
        ("InsufficientInstanceCapacity", "AWS has none of these instances left for now."),
        ("SomethingNew", "AWS refused RunInstances (SomethingNew)."),
    ],
)
def test_a_refusal_of_ec2_is_one_sentence(account, cluster, code, sentence):
    account.answers["ec2:RunInstances"] = lambda _: code

    (fault,) = faults(account, cluster)

    assert sentence in fault


def test_missing_permissions_are_named_and_the_other_checks_run(account, cluster):
    account.answers["service-quotas:GetServiceQuota"] = lambda _: "AccessDeniedException"
    account.answers["iam:GetInstanceProfile"] = lambda _: "AccessDenied"

    found = faults(account, cluster, "results.store=dynamodb", "results.table=nowhere")

    assert found[:2] == [
        "You may not GetServiceQuota (AccessDeniedException). Add the permission to your user or role.",
        "You may not GetInstanceProfile (AccessDenied). Add the permission to your user or role.",
    ]
    assert "There is no table 'nowhere'" in found[2]


def test_a_ray_version_other_than_the_images_is_named(account, cluster):
    changed = copy.deepcopy(cluster)
    changed["docker"]["head_image"] = "rayproject/ray:2.59.0-py311-cpu"

    (fault,) = faults(account, changed)

    assert re.match(r"Ray \S+ is installed here, and docker.head_image is .*2\.59\.0", fault)


# ---- bucket and table ------------------------------------------------------------------------


def test_the_runs_bucket_must_be_in_the_clusters_region(account, cluster):
    elsewhere = boto3.client("s3", "eu-central-1")
    elsewhere.create_bucket(
        Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
    )

    assert faults(account, cluster, f"train.storage=s3://{BUCKET}/runs") == []
    (fault,) = faults(account, cluster, "train.storage=s3://far/runs")
    assert fault.startswith("The bucket 'far' is in eu-central-1, and the cluster in us-east-1:")
    (fault,) = faults(account, cluster, "train.storage=s3://none?region=us-east-1")
    assert fault.startswith("There is no bucket 'none'.")
    assert faults(account, cluster, "train.storage=/shared/runs") == []


@pytest.mark.parametrize(
    "code, sentence",
    [
        ("403", "You may not use the bucket 'far', or it is not account 123456789012's."),
        ("301", "The bucket 'far' is in eu-central-1,"),
    ],
)
def test_a_refusal_of_s3_is_one_sentence(account, cluster, code, sentence):
    account.answers["s3:HeadBucket"] = lambda _: code

    (fault,) = faults(account, cluster, "train.storage=s3://far/runs")

    assert fault.startswith(sentence)


def test_a_table_in_another_region_is_found_there(account, cluster):
    DynamoDBStore("far", region="eu-central-1").create_table()

    (fault,) = faults(account, cluster, "results.store=dynamodb", "results.table=far")

    assert fault.startswith(
        "The table 'far' is in eu-central-1 and not in us-east-1. Pass results.region=eu-central-1"
    )
    words = ("results.store=dynamodb", "results.table=far", "results.region=eu-central-1")
    assert faults(account, cluster, *words) == []
    assert faults(account, cluster, "results.table=nowhere") == []  # in SQLite


# ---- the command -----------------------------------------------------------------------------


def test_the_command_prints_the_faults_and_exits_with_2(account, capsys, monkeypatch):
    monkeypatch.setattr(boto3, "Session", lambda: account.session)

    assert tool["main"](["flan-t5-base", *ON_DYNAMODB]) == 0
    assert "all that cluster/aws.yaml needs in us-east-1." in capsys.readouterr().out
    account.quotas |= {"L-DB2E81BA": 0.0, "L-3819A6DF": 0.0}
    assert tool["main"]([]) == 2
    assert capsys.readouterr().err.count("aws_account.py: The quota ") == 2
    assert tool["main"](["train.stroage=s3://b/r"]) == 2
    assert "did you mean 'train.storage'?" in capsys.readouterr().err


def test_an_unknown_profile_is_one_sentence(account, capsys, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")

    assert tool["main"]([]) == 2
    assert "(no-such-profile) could not be found. Set AWS_PROFILE" in capsys.readouterr().err
