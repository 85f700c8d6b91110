"""Run `ray up cluster/aws.yaml` on an emulated AWS: no account, no cost, 20 seconds.

python scripts/aws_dry_run.py            print what it would do, as JSON
python scripts/aws_dry_run.py --write    write that to tests/data/aws_launch.json for the tests

First, the script checks for mistakes that the launcher accepts, and prints a line for each.

    cluster/iam.yaml --> CloudFormation      roles, instance profiles, bucket
    ray up           --> EC2, SSH            key, subnets, security group, the head and its setup
    Ray's autoscaler --> EC2, SSH            one worker of each type, its setup, and its end

Ray runs unchanged: the launcher from `create_or_update_cluster` on, and the parts of autoscaler v2 that
touch a node (`FileConfigReader`, `NodeProviderAdapter`, `RayInstaller`), with login shells as in `ray up`.
These parts are replaced:

    AWS                    moto
    ssh, rsync, programs   tests/fake_ssh.py: processes that a real shell of the node starts and that
    of a node              record themselves; nothing is installed and Ray does not start
    the head               this process. It reads the configuration that the launcher copied to the
                           head, but a temporary folder is its /home/ray, and its address is "HEAD"
    autoscaler's decision  one node of each type, instead of the scheduler's choice

Needs the extra `dev`. `aws_account.py` checks your own account.
"""

import difflib
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/data/aws_launch.json"
CLUSTER = ROOT / "cluster/aws.yaml"
IAM = ROOT / "cluster/iam.yaml"
PRICES = ROOT / "cluster/prices.yaml"
MOTO_TIMEOUT_S = 120
"""Longest wait for instances to be launched or terminated on moto."""
fake_ssh = runpy.run_path(str(ROOT / "tests/fake_ssh.py"))


# ---- checks without AWS ----------------------------------------------------------------------


def find_faults(cluster: dict[str, Any], prices: dict[str, Any]) -> list[str]:
    """List mistakes that the launcher's schema accepts, one line each.

    Args:
        cluster: as in `cluster/aws.yaml`.
        prices: as in `cluster/prices.yaml`.
    """
    faults = []
    known = prices["instance_types"]
    versions = (ROOT / "constraints.txt").read_text("utf-8")
    ray = re.findall(r"^ray==(\S+)$", versions, re.M)[0]
    images = cluster["docker"]
    region = cluster["provider"]["region"]
    if "image" not in images:
        faults.append(
            "docker.image is missing: Ray's autoscaler reads it even if worker_image is set, and no "
            "worker starts without it. Set it to the workers' image."
        )
    for key, kind in (
        ("head_image", r"(cpu|cu\d+)"),
        ("image", r"cu\d+"),
        ("worker_image", r"cu\d+"),
    ):
        if key != "head_image" and key not in images:
            continue
        if not re.fullmatch(rf"rayproject/ray:{re.escape(ray)}-py311-{kind}", images.get(key, "")):
            faults.append(
                f"docker.{key} is {images.get(key)!r}; expected rayproject/ray:{ray}-py311-"
                f"{'cpu' if key == 'head_image' else 'cu128'}, the Ray of constraints.txt."
            )
    if f"-e AWS_DEFAULT_REGION={region}" not in images["run_options"]:
        faults.append(
            f"docker.run_options sets another AWS_DEFAULT_REGION than provider.region ({region})."
        )
    if "-e RAY_AUTH_MODE=token" not in images["run_options"]:
        faults.append(
            "docker.run_options does not set RAY_AUTH_MODE=token: anybody could use the cluster."
        )
    for name, node in cluster["available_node_types"].items():
        where = f"available_node_types.{name}"
        least, most = node.get("min_workers", 0), node.get("max_workers", 0)
        is_head = name == cluster["head_node_type"]
        if least > most:
            faults.append(f"{where}: min_workers ({least}) is more than max_workers ({most}).")
        if most > cluster["max_workers"]:
            faults.append(
                f"{where}: max_workers ({most}) is more than the cluster's ({cluster['max_workers']})."
            )
        kind = node["node_config"]["InstanceType"]
        if kind not in known:
            near = difflib.get_close_matches(kind, known, 1)
            faults.append(
                f"{where}: InstanceType {kind!r} is not in cluster/prices.yaml"
                + (f"; did you mean {near[0]!r}?" if near else ".")
            )
            continue
        for unit, has in (("CPU", known[kind]["cpus"]), ("GPU", known[kind]["gpus"])):
            says = node["resources"].get(unit, 0)
            if says != (0 if is_head else has):
                faults.append(
                    f"{where}: resources.{unit} is {says}, and "
                    + (
                        "the head runs no training or scoring."
                        if is_head
                        else f"a {kind} has {has}."
                    )
                )
        profile = node["node_config"].get("IamInstanceProfile", {}).get("Name", "")
        expected = f"{cluster['cluster_name']}-{'head' if is_head else 'worker'}"
        if profile != expected:
            faults.append(
                f"{where}: IamInstanceProfile is {profile!r}; cluster/iam.yaml creates {expected!r}."
            )
    least = sum(node.get("min_workers", 0) for node in cluster["available_node_types"].values())
    if least > cluster["max_workers"]:
        faults.append(f"The sum of all min_workers is {least}, which is more than max_workers.")
    return faults


def cost_per_hour(
    cluster: dict[str, Any], prices: dict[str, Any], workers: dict[str, int]
) -> float:
    """Return dollars per hour of instances, disks and addresses, for the head and `workers` by type.

    This is an upper bound: spot instances count at the on-demand price.
    """
    dollars = 0.0
    for name, count in ({cluster["head_node_type"]: 1} | workers).items():
        node = cluster["available_node_types"][name]["node_config"]
        disk = sum(device["Ebs"]["VolumeSize"] for device in node["BlockDeviceMappings"])
        dollars += count * (
            prices["instance_types"][node["InstanceType"]]["per_hour"]
            + disk * prices["gp3_per_gb_month"] / prices["hours_per_month"]
            + prices["public_ipv4_per_hour"]
        )
    return dollars


def max_workers(cluster: dict[str, Any]) -> dict[str, int]:
    """Return the largest number of workers of each type."""
    types = cluster["available_node_types"].items()
    return {name: n["max_workers"] for name, n in types if name != cluster["head_node_type"]}


# ---- the launch on moto ----------------------------------------------------------------------


class Calls:
    """Records every request to AWS by name, and the parameters of those that start instances."""

    def __init__(self, session: Any) -> None:
        self.names: set[str] = set()
        self.started: list[dict[str, Any]] = []
        session.events.register("provide-client-params.*", self._note)

    def _note(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        self.names.add(f"{model.service_model.service_name}:{model.name}")
        if model.name == "RunInstances":
            self.started.append(json.loads(json.dumps(params)))

    def take(self) -> list[str]:
        names, self.names = sorted(self.names), set()
        return names


@contextmanager
def emulated_aws() -> Any:
    """Emulate AWS and its nodes for this process, with fake credentials and a temporary home folder."""
    from moto import mock_aws

    home = tempfile.mkdtemp(prefix="ray-detox-home-")
    kept = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
        del os.environ[name]
    os.environ |= fake_ssh["install"](f"{home}/fake") | {
        "HOME": home,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": yaml.safe_load(CLUSTER.read_text("utf-8"))["provider"]["region"],
        "RAY_UP_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    (Path(home) / ".ray").mkdir()
    (Path(home) / ".ray/auth_token").write_text("not a real token")
    (Path(home) / "ray-detox").mkdir()
    kept_folder = Path.cwd()
    os.chdir(ROOT)  # file_mounts are relative to the checkout
    try:
        with mock_aws():
            yield Path(home)
    finally:
        os.chdir(kept_folder)
        os.environ.clear()
        os.environ.update(kept)
        shutil.rmtree(home, ignore_errors=True)


def dry_run(cluster: dict[str, Any]) -> dict[str, Any]:
    """Bring a cluster up on moto, and return all requests to AWS and commands on the nodes.

    Args:
        cluster: as in `cluster/aws.yaml`.
    """
    with emulated_aws() as home:
        import boto3
        from ray.autoscaler._private import commands
        from ray.autoscaler._private.cli_logger import cli_logger

        cli_logger.configure(log_style="record", verbosity=0)
        boto3.setup_default_session()
        calls = Calls(boto3.DEFAULT_SESSION)
        stack = _deploy(boto3.client("cloudformation"))
        calls.take()

        file = home / "aws.yaml"
        file.write_text(json.dumps(cluster), "utf-8")
        config = commands.create_or_update_cluster(
            str(file), None, None, False, False, yes=True, no_config_cache=True
        )
        groups = boto3.client("ec2").describe_security_groups(
            GroupIds=config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
        )
        (head,) = (file.stem for file in (home / "fake").glob("*.jsonl"))
        ran = fake_ssh["records"](f"{home}/fake", head)
        found: dict[str, Any] = {
            "stack": stack,
            "resources": {n: t["resources"] for n, t in config["available_node_types"].items()},
            "ingress": [_rule(rule) for rule in groups["SecurityGroups"][0]["IpPermissions"]],
            "asked_by_you": calls.take(),
            "head": [fake_ssh["line"](record) for record in ran],
        }
        workers = _bring_up_workers(home, head)
        found |= {
            "asked_by_the_head": calls.take(),
            "workers": {
                name: [fake_ssh["line"](record) for record in records]
                for name, records in workers.items()
            },
        }
        # rsync runs on the launcher's machine, so it has no login shell.
        on_nodes = [r for records in [ran, *workers.values()] for r in records]
        found["login_shells"] = all(r["login"] for r in on_nodes if r["argv"][0] != "rsync")
        started = {_node_type(call): call for call in calls.started}
        found["started"] = {name: started[name] for name in config["available_node_types"]}
        return _without_chance(found)


def _deploy(cloudformation: Any) -> dict[str, str]:
    """Deploy `cluster/iam.yaml` with its defaults, and return the outputs of the stack."""
    cloudformation.create_stack(
        StackName="cluster",
        TemplateBody=IAM.read_text("utf-8"),
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    (stack,) = cloudformation.describe_stacks(StackName="cluster")["Stacks"]
    return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}


def _bring_up_workers(home: Path, head: str) -> dict[str, list[dict[str, Any]]]:
    """Launch, set up and terminate a worker of each type, as the autoscaler on the head does.

    Args:
        home: takes the place of the home folder in the head's container.
        head: address that the launcher used for the head.

    Returns:
        By type, all commands that ran on the worker.
    """
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
    from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

    for file in (home / "fake/nodes" / head / "container/home/ray").iterdir():
        shutil.copy(file, home)
    settings = home / "ray_bootstrap_config.yaml"
    sent = json.loads(settings.read_text("utf-8"))
    sent["file_mounts"] = {
        remote: local.replace("/home/ray/", f"{home}/")
        for remote, local in sent["file_mounts"].items()
    }
    settings.write_text(json.dumps(sent), "utf-8")

    reader = FileConfigReader(str(settings))
    config = reader.get_cached_autoscaling_config()
    provider = _get_node_provider(config.get_provider_config(), config.get_config("cluster_name"))
    adapter = NodeProviderAdapter(provider, reader)
    types = [n for n in config.get_node_type_configs() if n != config.get_head_node_type()]
    os.environ["FAKE_GPU"] = "1"

    def workers() -> list[str]:
        for error in adapter.poll_errors():
            raise RuntimeError(f"EC2 refused a request: {error}") from error.__cause__
        return list(provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER}))

    def install(worker: str) -> tuple[str, list[dict[str, Any]]]:
        instance = Instance(
            instance_id=worker,
            cloud_instance_id=worker,
            instance_type=adapter.get_non_terminated()[worker].node_type,
            node_kind=NodeKind.WORKER,
            status=Instance.RAY_INSTALLING,
        )
        RayInstaller(provider, config).install_ray(instance, "HEAD")
        ran = fake_ssh["records"](f"{home}/fake", provider.internal_ip(worker))
        return instance.instance_type, ran

    adapter.launch(dict.fromkeys(types, 1), "dry-run")
    _wait_for(lambda: len(workers()) == len(types))
    with ThreadPoolExecutor(len(types)) as pool:
        ran = dict(pool.map(install, workers()))
    adapter.terminate(workers(), "dry-run")
    _wait_for(lambda: not workers())
    return {name: ran[name] for name in types}


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MOTO_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("The emulated EC2 did not start or end the instances in time.")
        time.sleep(0.1)


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    return {
        "protocol": rule["IpProtocol"],
        "ports": [rule.get("FromPort"), rule.get("ToPort")],
        "from": [r["CidrIp"] for r in rule["IpRanges"]]
        + ["itself" for _ in rule["UserIdGroupPairs"]],
    }


def _node_type(call: dict[str, Any]) -> str:
    tags = {tag["Key"]: tag["Value"] for tag in call["TagSpecifications"][0]["Tags"]}
    return str(tags["ray-user-node-type"])


def _without_chance(found: dict[str, Any]) -> dict[str, Any]:
    """Replace ids, addresses and folders that differ between runs."""
    text = json.dumps(found)
    for pattern, word in (
        (r"(subnet|sg|ami|i)-[0-9a-f]{8,}", r"\1-..."),
        (r"\b(?!127\.)\d+\.\d+\.\d+\.\d+\b(?!/)", "ADDRESS"),
        (r"/[^\s\"']*/ray-detox-home-\w+", "~"),
        (r"[^\s\"']*/ray-bootstrap-\w+", "RAY-BOOTSTRAP"),
        (re.escape(str(ROOT)), "."),
        (r'("Key": "ray-launch-config", "Value": )"\w+"', r'\1"HASH"'),
    ):
        text = re.sub(pattern, word, text)
    return dict(json.loads(text))


def main(words: list[str]) -> int:
    if words not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    cluster, prices = (yaml.safe_load(file.read_text("utf-8")) for file in (CLUSTER, PRICES))
    for fault in (faults := find_faults(cluster, prices)):
        print(f"aws.yaml: {fault}", file=sys.stderr)
    if faults:
        return 2
    cost = {
        "date": str(prices["date"]),
        "idle": round(cost_per_hour(cluster, prices, {}), 2),
        "at most": round(cost_per_hour(cluster, prices, max_workers(cluster)), 2),
    }
    with redirect_stdout(sys.stderr):  # the launcher prints its progress
        found = {"dollars_per_hour": cost} | dry_run(cluster)
    text = json.dumps(found, indent=1) + "\n"
    if words:
        GOLDEN.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
