"""Check what your AWS account lacks for `ray up cluster/aws.yaml` and a run; changes and costs nothing.

python scripts/aws_account.py [RECIPE] [SETTING=VALUE ...]

Pass the arguments of the run: train.storage and results.* name the bucket and the table to check.
The script prints all faults, one sentence each, and then exits with code 2.

    this environment   its Ray is the Ray of the images
    sts, ec2           the credentials and the region; if they are valid, then all of these:
        ec2              the region has the instance types; you may start the head (a dry run)
        service-quotas   quotas cover the CPUs of all nodes that max_workers allows
        ssm              the names of the AMIs exist
        iam              the instance profiles of cluster/iam.yaml exist
        s3, dynamodb     bucket and table exist, in this region

`aws_dry_run.py` checks the file alone and needs no account; run it first.
"""

import difflib
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import yaml
from botocore import exceptions
from botocore.config import Config

from ray_detox.config import ConfigError, RunConfig
from ray_detox.recipes.loading import load_config

ROOT = Path(__file__).resolve().parents[1]
QUOTAS = {
    ("G and VT", False): ("L-DB2E81BA", "Running On-Demand G and VT instances"),
    ("G and VT", True): ("L-3819A6DF", "All G and VT Spot Instance Requests"),
    ("Standard", False): ("L-1216C47A", "Running On-Demand Standard instances"),
    ("Standard", True): ("L-34B43A08", "All Standard Spot Instance Requests"),
}
"""Code and name by family and whether it is spot. All of them count CPUs."""
BAD_CREDENTIALS = (
    "AuthFailure",
    "ExpiredToken",
    "InvalidClientTokenId",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)
ANSWERS = {
    "OptInRequired": "this account is not signed up for it, or not for this region. Finish the account's "
    "registration, or enable the region under Account in the console.",
    "PendingVerification": "AWS is still verifying this account for the region, which takes some hours.",
    "Blocked": "AWS has blocked this account; ask its support.",
    "Unsupported": "the instance type is not available in this form. Choose another type or region.",
    "VcpuLimitExceeded": "the quota for on-demand CPUs is used up. Ask for more in Service Quotas, or "
    "stop other instances.",
    "MaxSpotInstanceCountExceeded": "the quota for spot CPUs is used up. Ask for more in Service Quotas, or "
    "stop other instances.",
    "InsufficientInstanceCapacity": "AWS has none of these instances left for now. Try again later, or "
    "choose another type or region.",
    "RequestLimitExceeded": "too many requests of this account at once. Try again.",
    "ThrottlingException": "too many requests of this account at once. Try again.",
    "TooManyRequestsException": "too many requests of this account at once. Try again.",
}
"""Meaning of AWS's refusals by code; `ray up` and the autoscaler's log show the same codes."""


class SignInError(Exception):
    """The region or the credentials are not valid, so nothing else can be checked."""


def find_faults(cluster: dict[str, Any], config: RunConfig, session: Any) -> list[str]:
    """List what the account lacks, one line per fault.

    Args:
        cluster: as in `cluster/aws.yaml`.
        config: of a run on it.
        session: of boto3.
    """
    faults = _versions(cluster)
    try:
        account = Account(cluster, session)
    except SignInError as error:
        return [*faults, str(error)]
    for check in (
        account.instance_types,
        account.quotas,
        account.image,
        account.profiles,
        lambda: account.bucket(config.train.storage),
        lambda: account.table(config) if config.results.store == "dynamodb" else [],
    ):
        faults += _faults_of(check)
    # Last, and only without other faults: a dry run of EC2 names only the first thing it lacks.
    return faults or _faults_of(account.start_head)


def _versions(cluster: dict[str, Any]) -> list[str]:
    """Check that the launcher here and the autoscaler in the image have the same version of Ray.

    Python may differ: jobs are submitted, and their drivers run on the head.
    """
    here = version("ray")
    image = cluster["docker"]["head_image"]
    found = re.search(r":(\d[\d.]*\d)-py", image)
    if found and found[1] == here:
        return []
    return [
        f"Ray {here} is installed here, and docker.head_image is {image!r}. Install the tested version "
        "(pip install -c constraints.txt -e .), or set the image of this Ray."
    ]


class Account:
    """Checks of an account in one region.

    Args:
        cluster: as in `cluster/aws.yaml`.
        session: of boto3.

    Raises:
        SignInError: the region does not exist or is not enabled, or AWS refuses the credentials.
    """

    def __init__(self, cluster: dict[str, Any], session: Any) -> None:
        self.region = region = cluster["provider"]["region"]
        self._session = session
        known = session.get_available_regions("ec2")
        if region not in known:
            near = difflib.get_close_matches(region, known, 1)
            raise SignInError(
                f"provider.region is {region!r}, which AWS does not have"
                + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        refused = _faults_of(self._sign_in)
        if refused:
            raise SignInError(refused[0])
        self._name = cluster["cluster_name"]
        self._head = cluster["head_node_type"]
        types = cluster["available_node_types"]
        self._types = {n: t for n, t in types.items() if n == self._head or t["max_workers"]}
        self._cpus: dict[str, int] = {}
        """CPUs by instance type, of those that the region offers."""

    def _sign_in(self) -> list[str]:
        # us-east-1, because a region that is not enabled refuses even valid credentials.
        ordinary = self._session.get_partition_for_region(self.region) == "aws"
        asked = "us-east-1" if ordinary else self.region
        self.number = self._client("sts", asked).get_caller_identity()["Account"]
        regions = self._client("ec2", asked).describe_regions(AllRegions=True)["Regions"]
        self._regions = [r["RegionName"] for r in regions if r["OptInStatus"] != "not-opted-in"]
        if self.region not in self._regions:
            return [
                f"{self.region} is not enabled in account {self.number}. Enable it under Account in the "
                "console (it takes some minutes), or change provider.region."
            ]
        return []

    def _client(self, service: str, region: str | None = None) -> Any:
        # Short timeouts, because boto3's defaults take minutes on a network that blocks AWS.
        timeouts = Config(connect_timeout=5, read_timeout=15, retries={"total_max_attempts": 2})
        return self._session.client(service, region_name=region or self.region, config=timeouts)

    def instance_types(self) -> list[str]:
        """Check that the region offers every instance type."""
        ec2 = self._client("ec2")
        wanted = {t["node_config"]["InstanceType"] for t in self._types.values()}
        pages = ec2.get_paginator("describe_instance_type_offerings").paginate(
            LocationType="region", Filters=[{"Name": "instance-type", "Values": sorted(wanted)}]
        )
        offered = {o["InstanceType"] for page in pages for o in page["InstanceTypeOfferings"]}
        if offered:
            for each in ec2.describe_instance_types(InstanceTypes=sorted(offered))["InstanceTypes"]:
                self._cpus[each["InstanceType"]] = each["VCpuInfo"]["DefaultVCpus"]
        return [
            f"available_node_types.{name}: {kind} is not offered in {self.region}. Check its name, or "
            "choose another type or region."
            for name, node in self._types.items()
            if (kind := node["node_config"]["InstanceType"]) not in offered
        ]

    def quotas(self) -> list[str]:
        """Check that quotas cover all nodes of max_workers; other instances are not counted."""
        needs: dict[tuple[str, bool], int] = {}
        for name, node in self._types.items():
            kind = node["node_config"]["InstanceType"]
            spot = "InstanceMarketOptions" in node["node_config"]
            family = _family(kind)
            if kind in self._cpus and (family, spot) in QUOTAS:
                count = 1 if name == self._head else node["max_workers"]
                needs[family, spot] = needs.get((family, spot), 0) + count * self._cpus[kind]
        faults = []
        for which, need in needs.items():
            code, name = QUOTAS[which]
            has = self._quota(code)
            if has < need:
                faults.append(
                    f"The quota {name!r} ({code}) is {has:g} CPUs in {self.region}, and aws.yaml may start "
                    f"{need}. Ask for {need} in Service Quotas (hours to days), or lower max_workers."
                )
        return faults

    def _quota(self, code: str) -> float:
        quotas = self._client("service-quotas")
        which = {"ServiceCode": "ec2", "QuotaCode": code}
        # A quota that was never changed in this account has only a default value.
        answer = _found(
            quotas.get_service_quota, "NoSuchResourceException", **which
        ) or quotas.get_aws_default_service_quota(**which)
        return float(answer["Quota"]["Value"])

    def image(self) -> list[str]:
        """Check that the name of every AMI exists."""
        images = {t["node_config"]["ImageId"] for t in self._types.values()}
        names = sorted(
            i.removeprefix("resolve:ssm:") for i in images if i.startswith("resolve:ssm:")
        )
        if not names:
            return []
        missing = self._client("ssm").get_parameters(Names=names)["InvalidParameters"]
        return [
            f"ImageId leads to {name}, and {self.region} has no such parameter. Look for the newest "
            "with: aws ssm get-parameters-by-path --path /aws/service/deeplearning/ami --recursive."
            for name in missing
        ]

    def profiles(self) -> list[str]:
        """Check that every instance profile exists."""
        get = self._client("iam").get_instance_profile
        names = {t["node_config"]["IamInstanceProfile"]["Name"] for t in self._types.values()}
        return [
            f"The instance profile {name!r} is not in account {self.number}. Deploy cluster/iam.yaml, as "
            "cluster/README.md says."
            for name in sorted(names)
            if _found(get, "NoSuchEntity", InstanceProfileName=name) is None
        ]

    def bucket(self, storage: str | None) -> list[str]:
        """Check that the bucket of `train.storage`, or of cluster/iam.yaml, is in the region."""
        address = storage or f"s3://{self._name}-{self.number}-{self.region}"
        if not address.startswith("s3://"):
            return []
        name = urlsplit(address).netloc
        try:
            head = self._client("s3").head_bucket
            # The name can be guessed, so somebody else may have taken it.
            there = head(Bucket=name, ExpectedBucketOwner=self.number).get("BucketRegion")
        except exceptions.ClientError as error:
            # The answer to HEAD has no body, so boto3 uses the status as its code.
            if _code(error) == "404":
                return [
                    f"There is no bucket {name!r}. Deploy cluster/iam.yaml, or change train.storage."
                ]
            if _code(error) == "403":
                return [
                    f"You may not use the bucket {name!r}, or it is not account {self.number}'s. Change "
                    "train.storage, or the policy of the bucket."
                ]
            if _code(error) != "301":
                raise
            there = error.response["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        if there in (None, self.region):
            return []
        return [
            f"The bucket {name!r} is in {there}, and the cluster in {self.region}: every checkpoint would "
            "cross regions, which costs money. Use a bucket of the same region."
        ]

    def table(self, config: RunConfig) -> list[str]:
        """Check that the table of `results.*` exists; if not, look for it in other regions."""
        name, region = config.results.table, config.results.region or self.region

        def is_in(region: str) -> bool:
            describe = self._client("dynamodb", region).describe_table
            return _found(describe, "ResourceNotFoundException", TableName=name) is not None

        if is_in(region):
            return []
        create = f"ray-detox table create results.table={name} results.region={region}"
        elsewhere = next(
            (other for other in self._regions if other != region and is_in(other)), None
        )
        if elsewhere:
            return [
                f"The table {name!r} is in {elsewhere} and not in {region}. Pass "
                f"results.region={elsewhere}, or create one: {create}."
            ]
        return [f"There is no table {name!r} in {region}. Create it: {create}."]

    def start_head(self) -> list[str]:
        """Check that you may start the head; a dry run, so EC2 starts nothing."""
        node = self._types[self._head]["node_config"]
        run = self._client("ec2").run_instances
        _found(run, "DryRunOperation", DryRun=True, MinCount=1, MaxCount=1, **node)
        return []


def _found(call: Callable[..., Any], absent: str, **request: Any) -> Any:
    """Return the answer to a request; None if AWS refuses it with the code `absent`."""
    try:
        return call(**request)
    except exceptions.ClientError as error:
        if _code(error) != absent:
            raise
        return None


def _code(error: exceptions.ClientError) -> str:
    return str(error.response["Error"]["Code"])


def _family(instance_type: str) -> str:
    """Return the family of quotas that counts an instance type; `other` is not checked."""
    if re.match(r"(g|vt)\d", instance_type):
        return "G and VT"
    return "Standard" if re.match(r"[acdhimrtz]\d", instance_type) else "other"


def _faults_of(check: Callable[[], list[str]]) -> list[str]:
    """Return the faults that a check finds; a refused request is a fault itself."""
    try:
        return check()
    except exceptions.ClientError as error:
        return [refusal(error.operation_name, _code(error))]
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        return [
            "No AWS credentials were found, or they are incomplete. Sign in: aws configure, or aws sso "
            "login."
        ]
    except (exceptions.ConnectionError, exceptions.HTTPClientError) as error:
        return [
            f"AWS could not be reached ({type(error).__name__}). Check the network and its proxy."
        ]
    except exceptions.BotoCoreError as error:
        # For example an expired sign-in of `aws sso login`; boto3's message is one sentence.
        return [f"{str(error).rstrip('.')}. Sign in again, or check the AWS configuration."]


def refusal(operation: str, code: str) -> str:
    """Explain a refusal by AWS and its fix in one line.

    AWS's own message is left out, because it may contain the request with its signature.
    """
    if code in BAD_CREDENTIALS:
        return (
            f"AWS refused the credentials ({code}). Sign in again: aws configure, or aws sso login."
        )
    if code in ANSWERS:
        return f"AWS refused {operation} ({code}): {ANSWERS[code]}"
    if code.startswith(("AccessDenied", "UnauthorizedOperation")):
        return f"You may not {operation} ({code}). Add the permission to your user or role."
    return f"AWS refused {operation} ({code})."


def main(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    recipe = next((word for word in words if "=" not in word), "flan-t5-base")
    cluster = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text("utf-8"))
    try:
        config = load_config(recipe, [word for word in words if word != recipe])
        faults = find_faults(cluster, config, boto3.Session())
    except ConfigError as error:
        faults = [str(error)]
    except exceptions.ProfileNotFound as error:
        faults = [f"{error}. Set AWS_PROFILE to one of `aws configure list-profiles`, or unset it."]
    for fault in faults:
        print(f"aws_account.py: {fault}", file=sys.stderr)
    if not faults:
        print(
            f"The account has all that cluster/aws.yaml needs in {cluster['provider']['region']}."
        )
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
