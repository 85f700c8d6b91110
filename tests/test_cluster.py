"""The cluster on AWS, tested without an account.

The files themselves, Ray's launcher and autoscaler on them (against moto, without a Ray cluster), and
the scripts of a node (against an emulated metadata service).
"""

import copy
import fnmatch
import http.server
import itertools
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cfnlint.decode import cfn_yaml

from ray_detox.recipes.loading import load_config
from ray_detox.runs.storage import Storage
from ray_detox.store.dynamodb import DynamoDBStore
from tests.autoscaler import nodes_asked_for
from tests.dry_run import aws_dry_run

ROOT = Path(__file__).resolve().parents[1]
DRY_RUN = ROOT / "scripts/aws_dry_run.py"
IAM = ROOT / "cluster/iam.yaml"
tool = runpy.run_path(str(DRY_RUN))


def read(name):
    return yaml.safe_load((ROOT / "cluster" / name).read_text(encoding="utf-8"))


@pytest.fixture
def cluster():
    return read("aws.yaml")


@pytest.fixture(scope="module")
def prices():
    return read("prices.yaml")


# ---- the file --------------------------------------------------------------------------------


def test_the_launcher_accepts_the_file_without_edits(cluster, prices):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))

    assert tool["find_faults"](cluster, prices) == []
    assert "123456789012" not in json.dumps(cluster)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"idle_timeout_min": 3}, "Additional properties are not allowed"),
        ({"head_node_type": "haed"}, "`head_node_type` must be one of `available_node_types`"),
        ({"train_gpu": {"spot": True}}, "Additional properties are not allowed"),
        ({"train_gpu": {"resources": {"CPU": 8, "GPU": 0.5}}}, "0.5 is not of type 'integer'"),
        ({"train_gpu": {"resources": None}}, "None is not of type 'object'"),
        ({"train_gpu": {"min_workers": 9}}, "smaller than the sum of `min_workers`"),
    ],
)
def test_the_launcher_names_a_mistake_that_its_schema_covers(cluster, change, sentence):
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises((ValidationError, ValueError)) as caught:
        validate_config(prepare_config(changed(cluster, change)))

    assert sentence in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"train_gpu": {"min_workers": 5}}, "min_workers (5) is more than max_workers (4)."),
        ({"train_gpu": {"max_workers": 9}}, "max_workers (9) is more than the cluster's (8)."),
        ({"max_workers": 4, "train_gpu": {"min_workers": 4}, "reward_gpu_spot": {"min_workers": 1}},
         "The sum of all min_workers is 5, which is more than max_workers."),
        ({"train_gpu": {"node_config": {"InstanceType": "g5.2xlarg"}}},
         "'g5.2xlarg' is not in cluster/prices.yaml; did you mean 'g5.2xlarge'?"),
        ({"reward_gpu_spot": {"resources": {"CPU": 8, "GPU": 1}}},
         "resources.CPU is 8, and a g4dn.xlarge has 4."),
        ({"train_gpu": {"resources": {"CPU": 8}}}, "resources.GPU is 0, and a g5.2xlarge has 1."),
        ({"head": {"resources": {"CPU": 4, "GPU": 0}}}, "resources.CPU is 4, and the head runs no"),
        ({"train_gpu": {"node_config": {"IamInstanceProfile": {"Name": "ray-detox-head"}}}},
         "cluster/iam.yaml creates 'ray-detox-worker'."),
        ({"docker": {"worker_image": "rayproject/ray:2.59.0-py311-cu128"}}, "the Ray of constraints"),
        ({"docker": {"worker_image": "rayproject/ray:2.60.0-py311-cpu"}}, "-py311-cu128, the Ray of"),
        ({"docker": {"image": "rayproject/ray:2.60.0-py311-cpu"}}, "docker.image is 'rayproject/ray:2"),
        ({"docker": {"head_image": "rayproject/ray:2.60.0"}}, "docker.head_image is 'rayproject/ray"),
        ({"provider": {"region": "eu-central-1"}}, "another AWS_DEFAULT_REGION than provider.region"),
        ({"docker": {"run_options": ["-e AWS_DEFAULT_REGION=us-east-1"]}}, "anybody could use the cluster."),
    ],
)  # fmt: skip
def test_the_dry_run_names_a_mistake_that_the_launcher_accepts(cluster, prices, change, sentence):
    faults = tool["find_faults"](changed(cluster, change), prices)

    assert any(sentence in fault for fault in faults), faults


def test_the_dry_run_names_a_missing_image(cluster, prices):
    del cluster["docker"]["image"]

    (fault,) = tool["find_faults"](cluster, prices)

    assert fault.startswith("docker.image is missing: Ray's autoscaler reads it even if")


def changed(cluster, change):
    """Merge `change` into the cluster; names of node types may stand at its top level."""

    def merge(into, new):
        for key, value in new.items():
            if isinstance(value, dict) and key != "resources":
                merge(into[key], value)
            else:
                into[key] = value

    types = cluster["available_node_types"]
    for key, value in copy.deepcopy(change).items():
        merge(types if key in types else cluster, {key: value})
    return cluster


def test_instance_types_match_the_table_of_prices(prices):
    from moto.ec2.models.instance_types import INSTANCE_TYPES

    for name, says in prices["instance_types"].items():
        has = INSTANCE_TYPES[name]
        gpus = has.get("GpuInfo", {}).get("Gpus", [])
        assert says["cpus"] == has["VCpuInfo"]["DefaultVCpus"]
        assert says["memory_gib"] * 1024 == has["MemoryInfo"]["SizeInMiB"]
        assert says["gpus"] == sum(gpu["Count"] for gpu in gpus)
        assert says.get("gpu") == (gpus[0]["Name"] if gpus else None)


def test_the_readme_states_what_an_hour_costs(cluster, prices):
    def cost(**workers):
        return round(tool["cost_per_hour"](cluster, prices, workers), 2)

    # 0.192 + 150 GB * 0.08 / 730 + 0.005
    assert cost() == 0.21
    # ... + 2 * (1.212 + 200 GB * 0.08 / 730 + 0.005) + (0.526 + 0.0219 + 0.005)
    assert cost(train_gpu=2, reward_gpu_spot=1) == 3.24
    assert cost(train_gpu=4, reward_gpu_spot=4) == 7.38
    assert re.fullmatch(r"20\d\d-\d\d", str(prices["date"]))
    readme = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    for dollars in ("$0.21", "$3.24", "$7.38", f"list prices of {prices['date']}"):
        assert dollars in readme


def test_objects_fit_into_shared_memory(cluster):
    (shm,) = [o for o in cluster["docker"]["run_options"] if o.startswith("--shm-size=")]
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    stores = re.findall(r"--object-store-memory=(\d+)", " ".join(commands))

    assert len(stores) == 2
    assert {2 * int(size) for size in stores} == {8 * 10**9}
    assert shm == "--shm-size=8g"


def test_every_number_is_explained():
    lines = (ROOT / "cluster/aws.yaml").read_text(encoding="utf-8").splitlines()

    for i, line in enumerate(lines):
        if re.match(r" *(max_workers|upscaling_speed|idle_\w+|priority): *\d", line):
            assert "#" in line or lines[i - 1].lstrip().startswith("#"), line
        if "VolumeSize" in line or "--shm-size" in line or "MetadataOptions" in line:
            assert lines[i - 1].lstrip().startswith("#"), line


# ---- decisions of the autoscaler --------------------------------------------------------------


def launches(cluster, demands):
    """Nodes by type that Ray's autoscaler adds for pending `(count, resources)`."""
    types = cluster["available_node_types"]
    golden = json.loads(tool["GOLDEN"].read_text(encoding="utf-8"))
    for name, node in types.items():
        # With memory and the kind of GPU, as the launcher fills them in.
        node["resources"] = golden["resources"][name]
    given = cluster | {"head_setup_commands": [], "cluster_synced_files": []}
    return nodes_asked_for(given, demands)


WORKER, ACTOR = {"CPU": 6, "GPU": 1}, {"CPU": 1, "GPU": 0.25}


def test_workers_get_a_node_each_and_four_actors_share_a_smaller_one(cluster):
    assert launches(cluster, [(2, WORKER), (8, ACTOR)]) == {"train_gpu": 2, "reward_gpu_spot": 2}


def test_workers_with_few_cpus_would_train_on_the_smaller_gpus(cluster):
    assert launches(cluster, [(2, {"CPU": 1, "GPU": 1})]) == {"reward_gpu_spot": 2}


def test_the_autoscaler_starts_at_most_max_workers(cluster):
    assert launches(cluster, [(9, WORKER), (99, ACTOR)]) == {"train_gpu": 4, "reward_gpu_spot": 4}


def test_spot_nodes_for_training_are_filled_first_and_spread_over_two_types(cluster):
    for name in ("train_gpu_spot_g6", "train_gpu_spot_g5"):
        cluster["available_node_types"][name]["max_workers"] = 2

    assert launches(cluster, [(1, WORKER)]) == {"train_gpu_spot_g6": 1}
    assert launches(cluster, [(5, WORKER)]) == {
        "train_gpu_spot_g6": 2, "train_gpu_spot_g5": 2, "train_gpu": 1
    }  # fmt: skip


def test_ray_requests_a_type_again_that_ec2_refused():
    # This is why aws.yaml spreads spot nodes over two types. If this test fails, Ray no longer needs that:
    # it then tries another type.
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import (
        CloudResourceMonitor,
    )
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    refused = InstanceUpdateEvent(
        instance_type="train_gpu_spot_g6", new_instance_status=Instance.ALLOCATION_FAILED
    )

    monitor.notify([refused])

    assert monitor.get_recoverable_resource_availabilities() == {}


# ---- the launcher -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run():
    """The output of `scripts/aws_dry_run.py`."""
    return aws_dry_run()


def test_the_dry_run_matches_the_reviewed_launch(dry_run):
    golden = json.loads(tool["GOLDEN"].read_text(encoding="utf-8"))

    assert dry_run == golden, "look at the difference, then: python scripts/aws_dry_run.py --write"


def test_no_port_is_public_and_everything_requires_the_token(dry_run):
    said = [*dry_run["head"], *itertools.chain(*dry_run["workers"].values())]
    starts = [command for command in said if "ray start" in command]
    containers = [command for command in said if command.startswith("docker run")]

    assert {tuple(rule["ports"]): rule["from"] for rule in dry_run["ingress"]} == {
        (None, None): ["itself"],
        (22, 22): ["0.0.0.0/0"],  # Ray's own group; the one of iam.yaml is narrower
    }
    assert len(starts) == len(containers) == len(dry_run["started"]) == 5
    assert "--dashboard-host=127.0.0.1 " in starts[0]
    assert "--num-cpus=0 --num-gpus=0" in starts[0]
    for command in containers:
        assert "-e RAY_AUTH_MODE=token" in command
        assert ":/home/ray/.ray/auth_token " in command


def test_instances_start_with_the_settings_of_the_file(dry_run, cluster):
    for name, node in cluster["available_node_types"].items():
        started = dry_run["started"][name]
        market = {"MarketType": "spot"} if "spot" in name else None

        assert started.get("InstanceMarketOptions") == market
        assert started["InstanceType"] == node["node_config"]["InstanceType"]
        assert started["MetadataOptions"]["HttpTokens"] == "required"
        assert started["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
        role = "head" if name == "head" else "worker"
        assert started["IamInstanceProfile"] == {"Name": f"ray-detox-{role}"}


# ---- roles and bucket ------------------------------------------------------------------------


def plain(node):
    """The template as plain values; cfn-lint's reader adds positions to them."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    return [plain(item) for item in node] if isinstance(node, list) else node


@pytest.fixture(scope="module")
def template():
    return plain(cfn_yaml.loads(IAM.read_text(encoding="utf-8")))


def statements(template, role):
    """The statements of a role (action, resource and condition) by Sid."""
    found = {}
    for policy in template["Resources"][role]["Properties"]["Policies"]:
        for statement in policy["PolicyDocument"]["Statement"]:
            assert statement["Effect"] == "Allow"
            found[statement["Sid"]] = tuple(
                statement.get(key) for key in ("Action", "Resource", "Condition")
            )
    return found


def ec2(kind):
    return {"Fn::Sub": f"arn:${{AWS::Partition}}:ec2:${{AWS::Region}}:${{AWS::AccountId}}:{kind}/*"}


def arn(service, rest):
    return {
        "Fn::Sub": f"arn:${{AWS::Partition}}:{service}:${{AWS::Region}}:${{AWS::AccountId}}:{rest}"
    }


NAME = {"Ref": "ClusterName"}
BUCKET = {"Fn::GetAtt": ["Bucket", "Arn"]}
OBJECTS = {"Fn::Sub": "${Bucket.Arn}/*"}


def test_the_linter_finds_nothing_at_any_level():
    done = subprocess.run(
        [Path(sys.executable).with_name("cfn-lint"), "--include-checks", "I", "--", IAM],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_heads_role_allows_this_cluster_bucket_and_table(template):
    run = "ec2:RunInstances"

    assert statements(template, "HeadRole") == {
        "StartInstances": (run, ec2("instance"), {
            "StringEquals": {
                "aws:RequestTag/ray-cluster-name": NAME, "ec2:MetadataHttpTokens": "required"
            },
            "StringLike": {"ec2:InstanceType": {"Ref": "WorkerTypes"}},
            "ArnEquals": {"ec2:InstanceProfile": {"Fn::GetAtt": ["WorkerProfile", "Arn"]}},
        }),
        "FromImagesOfAmazon": (
            run,
            {"Fn::Sub": "arn:${AWS::Partition}:ec2:${AWS::Region}::image/*"},
            {"StringEquals": {"ec2:Owner": "amazon"}},
        ),
        "WithWhatAnInstanceTakes": (run, [ec2(kind) for kind in (
            "key-pair", "network-interface", "security-group", "spot-instances-request", "subnet",
            "volume",
        )], None),
        "TagAtStart": ("ec2:CreateTags", ec2("instance"), {
            "StringEquals": {"ec2:CreateAction": "RunInstances"}
        }),
        "TagAndEndItsOwn": (["ec2:CreateTags", "ec2:TerminateInstances"], ec2("instance"), {
            "StringEquals": {"aws:ResourceTag/ray-cluster-name": NAME}
        }),
        "ListInstances": ("ec2:DescribeInstances", "*", {
            "StringEquals": {"aws:RequestedRegion": {"Ref": "AWS::Region"}}
        }),
        "GiveWorkersTheirRole": ("iam:PassRole", {"Fn::GetAtt": ["WorkerRole", "Arn"]}, {
            "StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}
        }),
        "FirstSpotInstance": ("iam:CreateServiceLinkedRole", {
            "Fn::Sub": "arn:${AWS::Partition}:iam::${AWS::AccountId}:role/aws-service-role/"
            "spot.amazonaws.com/AWSServiceRoleForEC2Spot"
        }, {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}}),
        "FindImage": ("ssm:GetParameters", {
            "Fn::Sub": "arn:${AWS::Partition}:ssm:${AWS::Region}::parameter${AmiParameter}"
        }, None),
        "ListBucket": (
            ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"], BUCKET, None
        ),
        "ReadAndWriteBucket": ([
            "s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject",
            "s3:ListMultipartUploadParts", "s3:PutObject",
        ], OBJECTS, None),
        "ReadAndWriteTable": ([
            "dynamodb:BatchGetItem", "dynamodb:BatchWriteItem", "dynamodb:DescribeTable",
            "dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:Query",
        ], [arn("dynamodb", "table/${TableName}"), arn("dynamodb", "table/${TableName}/index/*")], None),
    }  # fmt: skip


def test_the_workers_role_allows_reading_this_bucket_only(template):
    assert statements(template, "WorkerRole") == {
        "ListBucket": (["s3:GetBucketLocation", "s3:ListBucket"], BUCKET, None),
        "ReadBucket": ("s3:GetObject", OBJECTS, None),
    }


def test_roles_have_no_other_policies_and_only_instances_assume_them(template):
    for role in ("HeadRole", "WorkerRole"):
        has = template["Resources"][role]["Properties"]
        (trust,) = has["AssumeRolePolicyDocument"]["Statement"]
        assert trust["Principal"] == {"Service": "ec2.amazonaws.com"}
        assert trust["Action"] == "sts:AssumeRole"
        assert "ManagedPolicyArns" not in has
    kinds = [resource["Type"] for resource in template["Resources"].values()]
    assert kinds.count("AWS::IAM::Role") == kinds.count("AWS::IAM::InstanceProfile") == 2
    assert "AWS::IAM::Policy" not in kinds


def test_template_and_cluster_file_use_the_same_names(template, cluster):
    defaults = {name: p.get("Default") for name, p in template["Parameters"].items()}

    assert defaults["ClusterName"] == cluster["cluster_name"]
    for name, node in cluster["available_node_types"].items():
        config = node["node_config"]
        assert config["ImageId"] == f"resolve:ssm:{defaults['AmiParameter']}"
        allowed = defaults["WorkerTypes"].split(",")
        may_start = any(fnmatch.fnmatchcase(config["InstanceType"], one) for one in allowed)
        assert may_start == (name != "head")


def test_the_heads_role_allows_every_request_of_the_autoscaler(template, dry_run):
    assert set(dry_run["asked_by_the_head"]) <= actions(template, "HeadRole")


def actions(template, role):
    found = set()
    for action, _, _ in statements(template, role).values():
        found |= set(action if isinstance(action, list) else [action])
    return found


def test_the_heads_role_allows_every_request_of_a_run_to_the_table(template, monkeypatch):
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    report = {
        "run_id": "first", "recipe": "lab", "status": "complete", "n": 2,
        "created": "2026-01-31T12:00:00+00:00", "facts": None, "kl": 1.0, "converged": True,
        "verdict": {"name": "improved", "sentence": "", "reasons": []},
        "toxicity": {"before": {"mean": 0.2}, "after": {"mean": 0.1}, "delta": {"mean": -0.1}},
    }  # fmt: skip
    asked = set()
    with mock_aws():
        boto3.setup_default_session()
        DynamoDBStore("ray-detox", region="us-east-1").create_table()
        store = DynamoDBStore("ray-detox", region="us-east-1")
        store.client.meta.events.register(
            "provide-client-params.*",
            lambda model, **_: asked.add(f"dynamodb:{model.name}"),
        )
        for overwrite in (False, True):
            store.put_run(report, [{"index": 0, "query": "a"}], overwrite=overwrite)
        assert store.list_runs()

    assert "dynamodb:BatchWriteItem" in asked
    assert asked <= actions(template, "HeadRole")


def test_the_heads_role_allows_every_request_for_checkpoints(monkeypatch):
    import boto3
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    asked = set()
    monkeypatch.setattr(
        WSGIRequestHandler,
        "log_request",
        lambda self, *_: asked.add((self.command, self.path.split("?")[0].count("/") > 1)),
    )
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        boto3.client("s3").create_bucket(Bucket="bucket")
        asked.clear()
        storage = Storage("s3://bucket/runs/first")
        storage.write("checkpoint/step-1/state", b"0" * 100)
        assert storage.read("checkpoint/step-1/state") == b"0" * 100
        assert storage.read("checkpoint/none") is None
        assert storage.names("checkpoint") == ["step-1"]
        storage.delete("checkpoint/step-1")
    finally:
        server.stop()

    # Of the bucket itself it is listed and its objects are deleted, in one request for many; a PUT
    # there would make it.
    assert {command for command, on_object in asked if not on_object} <= {"GET", "HEAD", "POST"}
    assert ("PUT", True) in asked or ("POST", True) in asked


def test_the_bucket_is_private_encrypted_and_deletes_old_runs(template):
    bucket, policy = (template["Resources"][name] for name in ("Bucket", "BucketPolicy"))
    (deny,) = policy["Properties"]["PolicyDocument"]["Statement"]
    old, cut_off = bucket["Properties"]["LifecycleConfiguration"]["Rules"]

    assert bucket["DeletionPolicy"] == bucket["UpdateReplacePolicy"] == "Retain"
    assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
    assert "BucketOwnerEnforced" in json.dumps(bucket["Properties"]["OwnershipControls"])
    assert "AES256" in json.dumps(bucket["Properties"]["BucketEncryption"])
    assert (deny["Effect"], deny["Principal"]) == ("Deny", "*")
    assert deny["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert deny["Resource"] == [BUCKET, OBJECTS]
    assert (old["Prefix"], old["ExpirationInDays"]) == ("runs/", {"Ref": "RunDays"})
    assert cut_off["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}


def test_the_security_group_opens_only_ssh_and_only_to_one_address(template):
    group, itself = (template["Resources"][name] for name in ("Group", "GroupAmongItself"))
    (ssh,) = group["Properties"]["SecurityGroupIngress"]
    own = {"Fn::GetAtt": ["Group", "GroupId"]}

    assert group["Condition"] == itself["Condition"] == "MakeGroup"
    assert (ssh["FromPort"], ssh["ToPort"], ssh["CidrIp"]) == (22, 22, {"Ref": "SshFrom"})
    assert itself["Properties"]["SourceSecurityGroupId"] == itself["Properties"]["GroupId"] == own


# ---- scripts on a node -----------------------------------------------------------------------


class Metadata(http.server.BaseHTTPRequestHandler):
    """An emulated metadata service, version 2, which requires a token."""

    kind = "spot"
    notice: str | None = None
    asked: list[str]

    def do_PUT(self):
        self.answer("a-token" if "X-aws-ec2-metadata-token-ttl-seconds" in self.headers else None)

    def do_GET(self):
        self.asked.append(self.path)
        if self.headers.get("X-aws-ec2-metadata-token") != "a-token":
            return self.send_error(401)
        path = self.path.removeprefix("/latest/meta-data/")
        return self.answer(
            {"instance-life-cycle": self.kind, "spot/instance-action": self.notice}.get(path)
        )

    def answer(self, text):
        if text is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    handler = type("Handler", (Metadata,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def stub(folder, name, script):
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def watch(tmp_path, metadata):
    """Start the watcher with a fake `ray` that records its arguments, and fails the first time."""
    if shutil.which("wget") is None or shutil.which("flock") is None:
        pytest.skip("wget and flock, which Ray's image has, are not here")
    told = tmp_path / "told"
    stub(tmp_path / "bin", "python", "echo a warning; echo the-node-id")
    stub(tmp_path / "bin", "ray", f'echo "$*" >>{told}; [[ $(wc -l <{told}) -gt 1 ]]')
    started = []

    def start():
        process = subprocess.Popen(
            ["bash", ROOT / "cluster/spot_watch.sh"],
            env=os.environ
            | {
                "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
                "RAY_DETOX_IMDS": metadata.address,
                "RAY_DETOX_SPOT_POLL_S": "0.1",
                "RAY_DETOX_SPOT_LOCK": str(tmp_path / "lock"),
                "no_proxy": "127.0.0.1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    start.told = told
    yield start
    for process in started:
        process.kill()
        process.wait(10)


def test_a_spot_notice_makes_ray_drain_this_node(watch, metadata):
    watcher = watch()
    wait_for(lambda: any("spot/instance-action" in path for path in metadata.asked))
    assert not watch.told.exists()

    at = datetime.now(UTC) + timedelta(seconds=120)
    metadata.notice = json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})

    output, _ = watcher.communicate(timeout=30)
    assert watcher.returncode == 0
    refused, taken = watch.told.read_text().splitlines()
    for words in (refused, taken):
        assert words.startswith("drain-node --node-id the-node-id ")
        assert "--reason DRAIN_NODE_REASON_PREEMPTION" in words
        assert 90 <= int(words.split()[-1]) <= 110
    assert "Ray drains this node" in output


def test_the_watcher_ends_on_an_on_demand_instance(watch, metadata):
    metadata.kind = "on-demand"

    assert watch().wait(20) == 0

    assert metadata.asked == ["/latest/meta-data/instance-life-cycle"]


def test_a_second_watcher_ends_at_once(watch, metadata):
    first = watch()
    wait_for(lambda: metadata.asked)

    assert watch().wait(20) == 0
    assert first.poll() is None


def test_ray_accepts_the_arguments_of_the_watcher():
    from ray.scripts.scripts import drain_node

    script = (ROOT / "cluster/spot_watch.sh").read_text(encoding="utf-8")
    options = {option: parameter for parameter in drain_node.params for option in parameter.opts}
    said = set(re.findall(r"(--(?:node-id|reason\S*|deadline\S*))", script))

    assert said <= set(options)
    assert "DRAIN_NODE_REASON_PREEMPTION" in options["--reason"].type.choices


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_node_setup_installs_the_tested_versions_and_tolerates_a_failed_cache(tmp_path, kind):
    told = tmp_path / "told"
    stub(tmp_path / "bin", "python", f'echo "$*" >>{told}; [[ $1 == -m ]]')
    torch = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)[0]

    done = subprocess.run(
        ["bash", ROOT / "cluster/setup_node.sh", kind, "flan-t5-base"],
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    first, second, third = told.read_text().splitlines()
    cpu = " --index-url https://download.pytorch.org/whl/cpu" if kind == "head" else ""
    assert first == f"-m pip install -q {torch}{cpu}"
    assert second == "-m pip install -q -c constraints.txt ."
    assert third == "scripts/warm_cache.py flan-t5-base"
    assert "the cache was not filled for flan-t5-base" in done.stdout


def test_warm_cache_reports_each_setting_and_names_a_fault(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    warm = runpy.run_path(str(ROOT / "scripts/warm_cache.py"))["main"]

    assert warm(["lab"]) == 0
    assert "reward.model is cached" in capsys.readouterr().out
    assert warm(["lab", "policy.model=/nowhere"]) == 1
    assert "policy.model is '/nowhere', and no such folder is here" in capsys.readouterr().err
    assert warm(["lba"]) == 2


def test_nodes_are_set_up_for_a_recipe_that_exists(cluster):
    for kind in ("head", "worker"):
        (command,) = cluster[f"{kind}_setup_commands"]
        *_, said, recipe = command.split()
        assert said == kind
        assert load_config(recipe).policy.model == "google/flan-t5-base"
