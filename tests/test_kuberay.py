"""The run on Kubernetes, tested without a cluster.

The file against KubeRay's fields and rules, the decisions of Ray's own autoscaler on it, and its
agreement with `cluster/aws.yaml`, `constraints.txt` and our command line.
"""

import contextlib
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml

from ray_detox import resources
from ray_detox.cli import main as cli
from tests.autoscaler import nodes_asked_for

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "cluster/kuberay.yaml"
PINNED = (ROOT / "constraints.txt").read_text(encoding="utf-8")
GROUPS = {"train-gpu": "train_gpu", "reward-gpu-spot": "reward_gpu_spot"}
"""Worker groups, and the node types of aws.yaml that they match."""


@pytest.fixture
def documents():
    return list(yaml.safe_load_all(FILE.read_text(encoding="utf-8")))


@pytest.fixture
def job(documents):
    (job,) = [each for each in documents if each["kind"] == "RayJob"]
    return job


@pytest.fixture
def spec(job):
    return job["spec"]["rayClusterSpec"]


@pytest.fixture
def aws():
    return yaml.safe_load((ROOT / "cluster/aws.yaml").read_text(encoding="utf-8"))


def pods(job):
    """The pod specs of a job by name."""
    cluster = job["spec"]["rayClusterSpec"]
    named = {"submitter": job["spec"]["submitterPodTemplate"]}
    named["head"] = cluster["headGroupSpec"]["template"]
    named |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {name: template["spec"] for name, template in named.items()}


def environment(pod):
    return {each["name"]: each["value"] for each in pod["containers"][0]["env"]}


def gib(quantity):
    assert quantity.endswith("Gi"), quantity
    return int(quantity.removesuffix("Gi"))


# ---- fields ----------------------------------------------------------------------------------


def obj(required="", **fields):
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def one_of(*values):
    return {"enum": list(values)}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
MANY = {"type": "array", "items": {"type": "object"}, "minItems": 1}
# A quantity: 500m, 12Gi, or a whole number.
AMOUNTS = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [COUNT, {"type": "string", "pattern": r"^\d+(m|[KMGT]i?)?$"}]
    },
}
RESOURCES = obj(requests=AMOUNTS, limits=AMOUNTS)
LOCKED = obj(
    "allowPrivilegeEscalation capabilities", allowPrivilegeEscalation=FLAG, capabilities=obj(
        drop={"type": "array", "items": TEXT}
    )
)  # fmt: skip
CONTAINER = obj(
    "name image resources securityContext", name=TEXT, image=TEXT, resources=RESOURCES,
    securityContext=LOCKED, env={"type": "array", "items": obj("name value", name=TEXT, value=TEXT)},
    ports={"type": "array", "items": obj("name containerPort", name=TEXT, containerPort=COUNT)},
    volumeMounts={"type": "array", "items": obj("name mountPath", name=TEXT, mountPath=TEXT)},
)  # fmt: skip
POD = obj("spec", spec=obj(
    "containers restartPolicy", serviceAccountName=TEXT, automountServiceAccountToken=FLAG,
    restartPolicy=one_of("Never"), terminationGracePeriodSeconds=COUNT, nodeSelector=TEXTS,
    tolerations=MANY, volumes=MANY,
    containers={"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
    securityContext=obj(
        runAsUser=COUNT, runAsGroup=COUNT, runAsNonRoot=FLAG, seccompProfile=obj(type=TEXT)
    ),
))  # fmt: skip
# From the reference of ray.io/v1 in KubeRay 1.7, limited to the fields that the file uses. Fields with
# other names are rejected.
RAY_JOB = obj(
    "apiVersion kind metadata spec", apiVersion=one_of("ray.io/v1"), kind=one_of("RayJob"),
    # A DNS label, short enough for the suffixes that KubeRay appends.
    metadata=obj("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=obj(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT, runtimeEnvYAML=TEXT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterConfig=obj(backoffLimit=COUNT), submitterPodTemplate=POD, backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT, preRunningDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=obj(
            "headGroupSpec rayVersion workerGroupSpecs",
            rayVersion=TEXT, authOptions=obj(mode=one_of("disabled", "token"), secretName=TEXT),
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=obj(
                version=one_of("v1", "v2"), idleTimeoutSeconds=COUNT, resources=RESOURCES,
                upscalingMode=one_of("Default", "Aggressive", "Conservative"), securityContext=LOCKED,
            ),
            headGroupSpec=obj(
                "rayStartParams template", template=POD, rayStartParams=TEXTS, enableIngress=FLAG,
                serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
            ),
            workerGroupSpecs={"type": "array", "minItems": 1, "items": obj(
                "groupName minReplicas maxReplicas rayStartParams template", groupName=TEXT,
                replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, idleTimeoutSeconds=COUNT,
                priority=COUNT, rayStartParams=TEXTS, template=POD,
            )},
        ),
    ),
)  # fmt: skip


def test_every_field_matches_kuberays_schema(job):
    jsonschema.validate(job, RAY_JOB)


@pytest.mark.parametrize(
    "path, value, sentence",
    [
        ("spec.backOffLimit", 2, "'backOffLimit' was unexpected"),
        ("spec.submissionMode", "K8SJobMode", "'K8SJobMode' is not one of"),
        ("spec.rayClusterSpec.rayVersion", 2.6, "2.6 is not of type 'string'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", "4", "'4' is not of type 'integer'"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "'tokens' is not one of"),
        ("spec.rayClusterSpec.workerGroupSpecs.1.template.spec.restartPolicy", "Always", "'Always'"),
        ("spec.rayClusterSpec.workerGroupSpecs.1.template.spec.containers.0.resources.limits.memory",
         "12 GB", "'12 GB' does not match"),
    ],
)  # fmt: skip
def test_the_schema_rejects_a_field_that_kuberay_would_refuse_or_drop(job, path, value, sentence):
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    # The file uses anchors, so a change must apply to one of their places only.
    node = job = json.loads(json.dumps(job))
    for key in parents:
        node = node[key]
    node[last] = value

    with pytest.raises(jsonschema.ValidationError, match=re.escape(sentence)):
        jsonschema.validate(job, RAY_JOB)


def test_the_job_passes_kuberays_validation_beyond_the_schema(job, spec):
    assert job["spec"]["shutdownAfterJobFinishes"]  # otherwise ttlSecondsAfterFinished is refused
    assert spec["rayVersion"]  # otherwise token authentication is refused
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "resources" not in group  # beside num-cpus in rayStartParams
    for pod in pods(job).values():
        assert pod["restartPolicy"] == "Never"  # with autoscaler v2
        names = [volume["name"] for volume in pod.get("volumes", [])]
        mounts = pod["containers"][0].get("volumeMounts", [])
        assert {mount["name"] for mount in mounts} == set(names)


# ---- decisions of the autoscaler --------------------------------------------------------------


@pytest.fixture
def launches(spec):
    """Pods by group that Ray's autoscaler adds for pending `(count, resources)`."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr as derive,
    )

    settings = derive({"metadata": {"name": "detox", "namespace": "default"}, "spec": spec})
    return functools.partial(nodes_asked_for, settings)


def test_the_autoscaler_starts_exactly_the_pods_that_a_run_needs(launches, job):
    config = config_of(job)
    need = resources.needs(config, cluster_gpus=8)
    worker, actor = (
        {"CPU": bundle.cpus, "GPU": bundle.gpus} for bundle in (need.worker, need.actor)
    )

    assert (config.train.min_workers, config.reward.max_actors) == (2, 8)
    assert launches([(2, worker), (8, actor)]) == {"train-gpu": 2, "reward-gpu-spot": 2}
    assert launches([(9, worker), (99, actor)]) == {"train-gpu": 4, "reward-gpu-spot": 4}
    assert launches([]) == {}


# ---- agreement with other files------------------------------------------------------------------


def test_worker_groups_match_the_node_types_on_aws(spec, aws):
    types = aws["available_node_types"]

    for group in spec["workerGroupSpecs"]:
        node = types[GROUPS[group["groupName"]]]
        start = group["rayStartParams"]
        assert {"CPU": int(start["num-cpus"]), "GPU": int(start["num-gpus"])} == node["resources"]
        assert group["minReplicas"] == node["min_workers"]
        assert group["maxReplicas"] == node["max_workers"]
        labels = group["template"]["spec"]["nodeSelector"]
        assert labels["node.kubernetes.io/instance-type"] == node["node_config"]["InstanceType"]
        spot = "InstanceMarketOptions" in node["node_config"]
        assert labels["karpenter.sh/capacity-type"] == ("spot" if spot else "on-demand")
        idle_s = group.get("idleTimeoutSeconds", spec["autoscalerOptions"]["idleTimeoutSeconds"])
        assert idle_s == node.get("idle_timeout_s", 60 * aws["idle_timeout_minutes"])
    head = spec["headGroupSpec"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    label = head["template"]["spec"]["nodeSelector"]["node.kubernetes.io/instance-type"]
    assert label == types["head"]["node_config"]["InstanceType"]


def test_one_pod_fills_a_node_and_leaves_kubernetes_its_share(job, spec):
    prices = yaml.safe_load((ROOT / "cluster/prices.yaml").read_text(encoding="utf-8"))
    autoscaler = spec["autoscalerOptions"]["resources"]["requests"]
    assert autoscaler == {"cpu": "500m", "memory": "512Mi"}

    for name in ("head", *GROUPS):
        pod = pods(job)[name]
        has = prices["instance_types"][pod["nodeSelector"]["node.kubernetes.io/instance-type"]]
        asks, limits = (pod["containers"][0]["resources"][key] for key in ("requests", "limits"))
        cpus = int(asks["cpu"]) + (0.5 if name == "head" else 0)
        # EKS reserves less than 0.1 CPU and 1.5 GiB on these types; agents on each node take more.
        assert has["cpus"] / 2 < cpus <= has["cpus"] - 0.5
        assert has["memory_gib"] / 2 < gib(asks["memory"]) <= has["memory_gib"] - 3
        assert limits["memory"] == asks["memory"]
        assert limits.get("nvidia.com/gpu", 0) == has["gpus"]


def test_objects_fit_into_shared_memory_and_shared_memory_into_the_pod(job, spec, aws):
    said = " ".join(aws["head_start_ray_commands"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        objects = group["rayStartParams"]["object-store-memory"]
        assert f"--object-store-memory={objects} " in said
    for name in ("head", *GROUPS):
        pod = pods(job)[name]
        (volume,) = pod["volumes"]
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
        assert pod["containers"][0]["volumeMounts"] == [
            {"name": volume["name"], "mountPath": "/dev/shm"}
        ]
        assert gib(pod["containers"][0]["resources"]["limits"]["memory"]) > 8


def version(package):
    return re.findall(rf"^{package}==(\S+)$", PINNED, re.M)[0]


def test_images_have_the_tested_ray_and_python(job, spec):
    python = re.findall(r"on Python (\d)\.(\d+), Linux", PINNED)[0]
    tag = f"{version('ray')}-py{''.join(python)}"
    kinds = {"submitter": "cpu", "head": "cpu", "train-gpu": "cu128", "reward-gpu-spot": "cu128"}

    assert spec["rayVersion"] == version("ray")
    for name, pod in pods(job).items():
        assert pod["containers"][0]["image"].partition("/")[2] == f"ray-detox:{tag}-{kinds[name]}"
    recipe = (ROOT / "cluster/Dockerfile").read_text(encoding="utf-8")
    assert f"\nFROM rayproject/ray:{tag}-${{VARIANT}}\n" in recipe
    assert f"/ray-detox:{tag}-$variant . && docker push" in recipe
    aws_images = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text(encoding="utf-8"))["docker"]
    assert aws_images["head_image"] == f"rayproject/ray:{tag}-cpu"
    assert aws_images["worker_image"] == f"rayproject/ray:{tag}-cu128"


@pytest.mark.parametrize("variant, kind", [("cpu", "head"), ("cu128", "worker")])
def test_an_image_is_built_with_the_setup_script_of_the_nodes_on_aws(tmp_path, variant, kind):
    recipe = (ROOT / "cluster/Dockerfile").read_text(encoding="utf-8")
    (command,) = re.findall(r"^RUN (.*?)(?<!\\)$", recipe, re.M | re.S)
    arguments = tmp_path / "arguments"
    (tmp_path / "bash").write_text(f'#!/bin/sh\necho "$*" >{arguments}\n')
    (tmp_path / "bash").chmod(0o755)

    subprocess.run(
        ["/bin/sh", "-c", command.replace("\\\n", "")],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "VARIANT": variant,
            "RECIPE": "flan-t5-base",
        },
        check=True,
        timeout=60,
    )

    assert arguments.read_text() == f"cluster/setup_node.sh {kind} flan-t5-base\n"
    assert "\nCOPY --chown=1000:100 . .\n" in recipe
    left_out = (ROOT / "cluster/Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert {"**/.git", "**/.venv", "**/runs"} <= set(left_out)


# ---- the run ---------------------------------------------------------------------------------


def arguments_of(job):
    """The entrypoint, parsed by our command line."""
    python, dash_m, module, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, module) == ("python", "-m", "ray_detox")
    args, rest = cli._parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
    args.words += rest
    return args


def config_of(job):
    return cli._load(arguments_of(job).words)


def test_the_entrypoint_is_a_run_that_can_be_retried(job, aws):
    args, config = arguments_of(job), config_of(job)

    assert args.verb is cli._run
    assert args.resume is None
    # A retry continues by its run id, from storage that outlives the head.
    assert args.run_id == job["metadata"]["name"]
    assert config.recipe == "flan-t5-base"
    assert re.fullmatch(r"s3://ray-detox-ACCOUNT-us-east-1/runs", config.train.storage or "")
    assert (config.results.store, config.results.table) == ("dynamodb", "ray-detox")
    assert job["spec"]["backoffLimit"] == 2
    # No worker fits on a reward node, and the run waits no longer for a pod than the pod may take.
    smallest = aws["available_node_types"]["reward_gpu_spot"]["resources"]["CPU"]
    assert config.cluster.cpus_per_worker > smallest
    assert config.cluster.capacity_timeout_s >= 900


def test_the_job_and_every_pod_set_the_environment_of_a_run(job):
    runtime = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    region = re.findall(r"ecr\.(\S+?)\.amazonaws", pods(job)["head"]["containers"][0]["image"])[0]

    assert set(runtime) == {"env_vars"}  # all else is in the image
    assert int(runtime["env_vars"].pop("RAY_JOB_STOP_WAIT_TIME_S")) > 60
    expected = {"WR_ENGINE": "python", "AWS_DEFAULT_REGION": region}
    assert runtime["env_vars"] == expected
    for name in ("head", *GROUPS):
        assert expected.items() <= environment(pods(job)[name]).items()
        # KubeRay sets these itself; a value in the file would replace them.
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & environment(pods(job)[name]).keys()


def test_every_port_requires_a_token_and_none_is_public(documents, job, spec):
    head = spec["headGroupSpec"]

    assert spec["authOptions"] == {"mode": "token"}
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    assert {document["kind"] for document in documents} == {"ServiceAccount", "RayJob"}
    for name, pod in pods(job).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not [port for port in container.get("ports", []) if "hostPort" in port], name


def test_each_pod_has_a_role_and_only_the_head_may_call_kubernetes(documents, job):
    accounts = {d["metadata"]["name"]: d for d in documents if d["kind"] == "ServiceAccount"}
    iam = (ROOT / "cluster/iam.yaml").read_text(encoding="utf-8")
    text = FILE.read_text(encoding="utf-8")

    assert pods(job)["head"]["serviceAccountName"] == "ray-detox-head"
    assert {pods(job)[name]["serviceAccountName"] for name in GROUPS} == {"ray-detox-worker"}
    for name, account in accounts.items():
        role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        assert role == f"arn:aws:iam::ACCOUNT:role/ray-detox-eks-{name.rpartition('-')[2]}"
        mounted = account.get("automountServiceAccountToken", True)
        assert mounted == (name == "ray-detox-head")
    for policy, role in (("runs", "HeadRole"), ("models-and-data", "WorkerRole")):
        assert f"`{policy}` of {role}" in text
        assert f"PolicyName: {policy}\n" in iam.partition(f"  {role}:\n")[2].partition("Role:\n")[0]


def test_every_number_is_explained(job):
    text = FILE.read_text(encoding="utf-8")
    tool = runpy.run_path(str(ROOT / "scripts/aws_dry_run.py"))
    cluster, prices = (
        yaml.safe_load((ROOT / "cluster" / name).read_text(encoding="utf-8"))
        for name in ("aws.yaml", "prices.yaml")
    )

    def an_hour(**workers):
        return tool["cost_per_hour"](cluster, prices, workers)

    lines = text.splitlines()
    numbers = [
        i for i, line in enumerate(lines)
        if re.match(r"[ -]*(\w*Limit|\w+Seconds|(min|max)Replicas|num-cpus): \"?\d", line)
        or re.search(r"(requests|emptyDir): \{|_S\b.*\"\d|objects \"\d", line)
    ]  # fmt: skip
    assert len(numbers) > 20
    for i in numbers:
        assert " # " in lines[i] or lines[i - 1].lstrip().startswith("# "), lines[i]
    all_day = 24 * an_hour(**tool["max_workers"](cluster))
    assert f"that is ${all_day:.0f}," in text
    assert job["spec"]["activeDeadlineSeconds"] == 24 * 3600
    assert f"${an_hour(train_gpu=1) - an_hour():.2f} an hour each" in text


# ---- draining --------------------------------------------------------------------------------


def test_the_grace_period_is_longer_than_the_drain(job):
    for name in GROUPS:
        pod = pods(job)[name]
        drain_s = int(environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        # AWS takes a spot instance back two minutes after its notice.
        assert drain_s + 15 <= pod["terminationGracePeriodSeconds"] < 120
        assert "lifecycle" not in pod["containers"][0]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


DRIVER = """
import sys, time, ray
from ray._private import state
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Busy:
    def node(self):
        return ray.get_runtime_context().get_node_id()

busy = Busy.remote()
node = ray.get(busy.node.remote(), timeout=120)
print("busy", flush=True)
end = time.monotonic() + 120
while node not in state.state.get_draining_nodes() and time.monotonic() < end:
    time.sleep(0.2)
print("draining", node in state.state.get_draining_nodes(), flush=True)
"""


@pytest.mark.ray
def test_a_node_drains_after_sigterm_before_it_ends(job):
    # This is why the pods have no preStop hook. If this test fails, they need one with `ray drain-node`.
    folder = tempfile.mkdtemp(prefix="ray-")  # short, for the paths of Ray's sockets
    address = f"127.0.0.1:{free_port()}"
    settings = os.environ | environment(pods(job)["train-gpu"]) | {
        "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-gpus=0",
           "--object-store-memory=100000000", "--disable-usage-stats"]  # fmt: skip
    started = []

    def start(*words, **how):
        started.append(subprocess.Popen(words, env=settings, text=True, **how))
        return started[-1]

    try:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        start(*ray, "--head", f"--port={address.partition(':')[2]}", "--num-cpus=0",
              "--include-dashboard=false", f"--temp-dir={folder}",
              "--node-ip-address=127.0.0.1", **quiet)  # fmt: skip
        wait_for_port(address)
        worker = start(
            *ray, f"--address={address}", "--num-cpus=1", "--node-ip-address=127.0.0.1", **quiet
        )
        driver = start(sys.executable, "-c", DRIVER, address, stdout=subprocess.PIPE)
        assert driver.stdout.readline() == "busy\n"

        worker.send_signal(signal.SIGTERM)

        assert driver.stdout.readline() == "draining True\n"
        assert worker.poll() is None
    finally:
        # With all child processes, because a raylet outlives its `ray start`.
        family = [psutil.Process(process.pid) for process in started if process.poll() is None]
        family += [child for process in family for child in process.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in started:
            process.wait(30)
        psutil.wait_procs(family, 30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(address, seconds=90):
    host, _, port = address.partition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nothing answers at {address}"
            time.sleep(0.2)
