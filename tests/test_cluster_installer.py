"""The setup of workers of `cluster/aws.yaml` by the installer of Ray's autoscaler.

Real: `RayInstaller.install_ray` and everything below it, with the configuration that the launcher
copies to the head. Replaced: AWS (moto), ssh, rsync and the programs of a node (`fake_ssh.py`);
`scripts/aws_dry_run.py` lists them all.
"""

import copy
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import fake_ssh
from tests.dry_run import aws_dry_run

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text(encoding="utf-8"))
HEAD = CLUSTER["head_node_type"]
WORKERS = [name for name in CLUSTER["available_node_types"] if name != HEAD]


@pytest.fixture(scope="module")
def dry_run():
    return aws_dry_run()


def autoscaling_config(cluster):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    return AutoscalingConfig(copy.deepcopy(cluster), skip_content_hash=True)


# ---- the image -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [HEAD, *WORKERS])
def test_the_autoscaler_finds_an_image_for_every_node_type(name):
    docker = autoscaling_config(CLUSTER).get_docker_config(name)

    image = CLUSTER["docker"]["head_image" if name == HEAD else "worker_image"]
    others = {k: v for k, v in CLUSTER["docker"].items() if not k.endswith("image")}
    assert docker == others | {"image": image}
    assert docker["container_name"] == "ray_detox"


@pytest.mark.parametrize("name", WORKERS)
def test_ray_installs_nothing_without_docker_image(name):
    # This is why aws.yaml sets docker.image beside worker_image. If this fails, Ray no longer needs it.
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
    from ray.core.generated.instance_manager_pb2 import Instance

    cluster = copy.deepcopy(CLUSTER)
    del cluster["docker"]["image"]
    installer = RayInstaller(provider=None, config=autoscaling_config(cluster))

    with pytest.raises(KeyError, match="'image'"):
        installer.install_ray(Instance(instance_type=name), "10.0.0.1")


# ---- the installer, from end to end ----------------------------------------------------------


def test_the_installer_sets_up_a_worker_of_every_type(dry_run):
    assert list(dry_run["workers"]) == WORKERS
    assert dry_run["login_shells"] is True


@pytest.mark.parametrize("name", [HEAD, *WORKERS])
def test_a_node_runs_the_image_of_its_kind(dry_run, name):
    ran = dry_run["head"] if name == HEAD else dry_run["workers"][name]
    image = CLUSTER["docker"]["head_image" if name == HEAD else "worker_image"]

    (pulled,) = [shlex.split(command) for command in ran if command.startswith("docker pull")]
    (container,) = [shlex.split(command) for command in ran if command.startswith("docker run")]

    assert pulled[2:] == [image]
    assert container[-2:] == [image, "bash"]
    assert container[container.index("--name") + 1] == CLUSTER["docker"]["container_name"]
    # Every node has NVIDIA's runtime, because the AMI has it, but only workers have a GPU.
    assert ("--runtime=nvidia" in container) == (name != HEAD)


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_set_up_and_starts_ray_in_its_container(dry_run, name):
    ran = dry_run["workers"][name]
    container = next(i for i, command in enumerate(ran) if command.startswith("docker run"))
    setup, stop, files, start, watch = [shlex.split(command) for command in ran[container + 1 :]]

    assert setup[-4:] == ["bash", *CLUSTER["worker_setup_commands"][0].split()[1:]]
    assert stop[-2:] == ["ray", "stop"]
    assert files[-3:] == ["ulimit", "-n", "65536"]
    assert start[-4:] == ["ray", "start", "--address=HEAD:6379", "--object-store-memory=4000000000"]
    assert watch[-2:] == ["bash", "/home/ray/ray-detox/cluster/spot_watch.sh"]
    assert {command[0] for command in (setup, stop, files, start, watch)} == {"ray_detox$"}
    assert {
        "RAY_HEAD_IP=HEAD",
        f"RAY_NODE_TYPE_NAME={name}",
        "RAY_CLOUD_INSTANCE_ID=i-...",
    } <= set(start)


@pytest.mark.parametrize("name", WORKERS)
def test_the_user_of_a_fresh_worker_is_let_into_dockers_group_before_the_image_is_pulled(
    dry_run, name
):
    ran = dry_run["workers"][name]

    let_in = next(i for i, command in enumerate(ran) if "usermod -aG docker ubuntu" in command)
    assert "docker info" in ran[let_in - 1]
    assert ran[let_in + 1].startswith("docker pull")


# ---- the stand-in for ssh --------------------------------------------------------------------


@pytest.fixture
def ssh(tmp_path):
    variables = fake_ssh.install(str(tmp_path / "fake"))

    def run(*words):
        return subprocess.run(
            ["ssh", *words], env=os.environ | variables, capture_output=True, text=True, timeout=60
        )

    run.records = lambda host: fake_ssh.records(str(tmp_path / "fake"), host)
    return run


def test_a_shell_of_the_node_parses_the_command(ssh):
    done = ssh("-o", "X=y", "me@node", "export RAY_A='b c'; cat \"$RAY_A\" '$HOME' && uptime")

    assert done.returncode == 0, done.stderr
    first, second = ssh.records("node")
    assert first["argv"] == ["cat", "b c", "$HOME"]
    assert first["env"] == {"RAY_A": "b c"}
    assert (second["argv"], second["login"], second["container"]) == (["uptime"], False, "")
    assert ssh.records("other") == []


def test_the_launchers_environment_does_not_reach_a_node(ssh, monkeypatch):
    monkeypatch.setenv("RAY_A", "b")

    assert ssh("me@node", "uptime").returncode == 0

    assert ssh.records("node")[0]["env"] == {}


def test_a_program_that_a_node_does_not_have_is_an_error(ssh):
    assert ssh("me@node", "terraform apply").returncode == 127
    assert ssh("me@node", "docker pull image").returncode == 1  # not yet in Docker's group


def test_a_terminal_mixes_both_outputs(ssh):
    done = ssh("-tt", "me@node", "docker info || true")

    assert done.stdout.startswith("permission denied")
    assert done.stderr == ""


def test_a_process_left_in_the_background_is_waited_for(ssh):
    assert ssh("me@node", "{ cat late; } >/tmp/log 2>&1 </dev/null & sleep 60").returncode == 0

    assert [record["argv"] for record in ssh.records("node")] == [["cat", "late"]]


def test_the_record_says_which_commands_ran_in_the_container(ssh):
    text = (
        "sudo usermod -aG docker $USER; docker run x; docker exec -it box /bin/bash -c 'ray stop'"
    )

    assert ssh("me@node", text).returncode == 0

    lines = [fake_ssh.line(record) for record in ssh.records("node")]
    assert lines == ["sudo usermod -aG docker ubuntu", "docker run x", "box$ ray stop"]
