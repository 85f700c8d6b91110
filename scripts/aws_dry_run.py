"""What `ray up cluster/aws.yaml` would do, on an emulated AWS: no account, no cost, 10 seconds.

python scripts/aws_dry_run.py            prints it as JSON
python scripts/aws_dry_run.py --write    into tests/data/aws_launch.json, which the tests compare

Before that, it looks for mistakes that the launcher would not name, and prints a sentence for each.

    cluster/iam.yaml --> CloudFormation      roles, instance profiles, bucket
    Ray's launcher   --> EC2                 key, subnets, security group, the head
    Ray's autoscaler --> EC2                 one worker of each type, tags, and its end

All of it is Ray's own code against moto; only what would go through SSH is written down instead.
Needs the extra `dev`. `aws_account.py` looks at your own account.
"""

import difflib
import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/data/aws_launch.json"
CLUSTER = ROOT / "cluster/aws.yaml"
IAM = ROOT / "cluster/iam.yaml"
PRICES = ROOT / "cluster/prices.yaml"
ANSWERS = {
    "command -v docker": "/usr/bin/docker",
    ".Config.Env": '["HOME=/home/ray"]',
    "printenv HOME": "/home/ray",
}
"""What a fresh node says to a command with these words in it; nothing to all others."""


# ---- what can be said without AWS ------------------------------------------------------------


def find_faults(cluster: dict[str, Any], prices: dict[str, Any]) -> list[str]:
    """Mistakes that the launcher's schema lets pass, each in a sentence.

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
    for key, kind in (("head_image", r"(cpu|cu\d+)"), ("worker_image", r"cu\d+")):
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
        faults.append("docker.run_options does not set RAY_AUTH_MODE=token: anybody may use it.")
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
                    + ("the head carries no load." if is_head else f"a {kind} has {has}.")
                )
        profile = node["node_config"].get("IamInstanceProfile", {}).get("Name", "")
        expected = f"{cluster['cluster_name']}-{'head' if is_head else 'worker'}"
        if profile != expected:
            faults.append(
                f"{where}: IamInstanceProfile is {profile!r}; cluster/iam.yaml makes {expected!r}."
            )
    least = sum(node.get("min_workers", 0) for node in cluster["available_node_types"].values())
    if least > cluster["max_workers"]:
        faults.append(f"All min_workers come to {least}, and max_workers is less.")
    return faults


def cost_per_hour(
    cluster: dict[str, Any], prices: dict[str, Any], workers: dict[str, int]
) -> float:
    """Dollars that an hour costs, of instances, disks and addresses: the head and `workers` of a type.

    An upper bound: spot is counted as on demand.
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
    """As many workers of each type as may run at a time."""
    types = cluster["available_node_types"].items()
    return {name: n["max_workers"] for name, n in types if name != cluster["head_node_type"]}


# ---- what it would do on AWS -----------------------------------------------------------------


class Commands:
    """Stands in for `subprocess`: writes down what would be run through ssh and rsync."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def run(command: list[str], *_: Any, **__: Any) -> Any:
            said = self.note(command)
            answer = next((ANSWERS[words] for words in ANSWERS if words in said), "")
            return 0 if name == "call" else answer.encode()

        return run

    def note(self, command: list[str]) -> str:
        # Less the options of ssh.
        said = command[-1] if command[0] == "ssh" else " ".join([command[0], *command[3:]])
        self.seen.append(said)
        return said

    def take(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


class Calls:
    """Every request to AWS, by name, and the parameters of those that start instances."""

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
    """An AWS of this process with nobody's credentials, and a home that is thrown away."""
    from moto import mock_aws

    home = tempfile.mkdtemp(prefix="ray-detox-home-")
    kept = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
        del os.environ[name]
    os.environ |= {
        "HOME": home,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": yaml.safe_load(CLUSTER.read_text("utf-8"))["provider"]["region"],
        "RAY_UP_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    (Path(home) / ".ray").mkdir()
    (Path(home) / ".ray/auth_token").write_text("a token of nobody's")
    kept_folder = Path.cwd()
    os.chdir(ROOT)  # as cluster/README.md says, for file_mounts
    try:
        with mock_aws():
            yield
    finally:
        os.chdir(kept_folder)
        os.environ.clear()
        os.environ.update(kept)
        shutil.rmtree(home, ignore_errors=True)


def dry_run(cluster: dict[str, Any]) -> dict[str, Any]:
    """Bring a cluster up on moto, and return everything that AWS and the nodes were told.

    Args:
        cluster: as in `cluster/aws.yaml`.
    """
    with emulated_aws():
        import boto3
        from ray.autoscaler._private import commands, subprocess_output_util
        from ray.autoscaler._private.cli_logger import cli_logger

        cli_logger.configure(log_style="record", verbosity=0)
        boto3.setup_default_session()
        calls, spoken = Calls(boto3.DEFAULT_SESSION), Commands()
        stack = _deploy(boto3.client("cloudformation"))
        calls.take()

        config = commands._bootstrap_config(json.loads(json.dumps(cluster)), no_config_cache=True)
        commands.set_using_login_shells(False)
        subprocess_output_util.set_allow_interactive(False)
        subprocess_output_util.set_output_redirected(True)
        subprocess_output_util.run_cmd_redirected = lambda command, **_: spoken.call(command)
        commands.get_or_create_head_node(
            json.loads(json.dumps(config)), str(CLUSTER), False, False, True, None, _runner=spoken
        )
        groups = boto3.client("ec2").describe_security_groups(
            GroupIds=config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
        )
        found = {
            "stack": stack,
            "resources": {n: t["resources"] for n, t in config["available_node_types"].items()},
            "ingress": [_rule(rule) for rule in groups["SecurityGroups"][0]["IpPermissions"]],
            "asked_by_you": calls.take(),
            "head": spoken.take(),
        }
        _start_workers(config, spoken)
        found |= {"asked_by_the_head": calls.take(), "worker": spoken.take()}
        found["started"] = {_node_type(call): call for call in calls.started}
        return _without_chance(found)


def _deploy(cloudformation: Any) -> dict[str, str]:
    """The stack of `cluster/iam.yaml` with its defaults; its outputs."""
    cloudformation.create_stack(
        StackName="cluster",
        TemplateBody=IAM.read_text("utf-8"),
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    (stack,) = cloudformation.describe_stacks(StackName="cluster")["Stacks"]
    return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}


def _start_workers(config: dict[str, Any], spoken: Commands) -> None:
    """What the autoscaler on the head does: start, tag, set up and end workers."""
    from ray.autoscaler import tags
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler._private.updater import NodeUpdater
    from ray.autoscaler._private.util import with_head_node_ip

    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name, node in config["available_node_types"].items():
        if name == config["head_node_type"]:
            continue
        marks = {
            tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_WORKER,
            tags.TAG_RAY_NODE_NAME: f"ray-{config['cluster_name']}-worker",
            tags.TAG_RAY_USER_NODE_TYPE: name,
        }
        provider.create_node(json.loads(json.dumps(node["node_config"])), marks, 1)
    workers = provider.non_terminated_nodes({tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_WORKER})
    (train,) = provider.non_terminated_nodes({tags.TAG_RAY_USER_NODE_TYPE: "train_gpu"})
    NodeUpdater(
        node_id=train,
        provider_config=config["provider"],
        provider=provider,
        auth_config=config["auth"],
        cluster_name=config["cluster_name"],
        # The head has them where they go; here they are where they came from.
        file_mounts={k: os.path.expanduser(v) for k, v in config["file_mounts"].items()},
        initialization_commands=config["initialization_commands"],
        setup_commands=config["worker_setup_commands"],
        ray_start_commands=with_head_node_ip(config["worker_start_ray_commands"], "HEAD"),
        runtime_hash="",
        file_mounts_contents_hash="",
        is_head_node=False,
        node_resources=config["available_node_types"]["train_gpu"]["resources"],
        process_runner=spoken,
        use_internal_ip=True,
        docker_config=config["docker"],
        rsync_options={key: config[key] for key in ("rsync_exclude", "rsync_filter")},
    ).run()
    for worker in workers:
        provider.terminate_node(worker)


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
    """The same without ids, addresses and folders that are others each time."""
    text = json.dumps(found)
    for pattern, word in (
        (r"(subnet|sg|ami|i)-[0-9a-f]{8,}", r"\1-..."),
        (r"\b(?!127\.)\d+\.\d+\.\d+\.\d+\b(?!/)", "ADDRESS"),
        (r"/[^ ]*/ray-detox-home-\w+", "~"),
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
    with redirect_stdout(sys.stderr):  # the launcher tells what it does
        found = {"dollars_per_hour": cost} | dry_run(cluster)
    text = json.dumps(found, indent=1) + "\n"
    if words:
        GOLDEN.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
