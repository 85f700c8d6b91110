"""Replacements of `ssh`, `rsync` and the programs of a node, which record what runs where.

`install` puts this file into two folders under many names, and the name decides what a process does:

    launcher (PATH has ssh and rsync)
      ssh USER@HOST COMMAND       --> real bash with the node's PATH, runs COMMAND
      rsync FILE USER@HOST:PATH   --> copies FILE (folders are not copied)
    node (PATH has only replacements)
      docker exec NAME bash -c .. --> real bash again, as the container
      docker, sudo, nvidia-smi .. --> answer as on a fresh node
      ray, ulimit, bash FILE ..   --> only record themselves

A shell of the node therefore parses all quoting, variables and `||` as on a real one, and a program
that is not listed is not found. As on a fresh node, the user may not use Docker before the first
`usermod`. As with a real `ssh -tt`, standard error goes to standard output and lines end in CR LF.

Not emulated: a terminal, start-up files of login shells, connections that are kept open. `sleep` returns
at once, and `ssh` waits for background processes of its shell, so that the order of the records is
always the same.

A cluster starts some 400 of these processes, so the module imports only what loads fast.
"""

import os
import sys

TYPE_CHECKING = False  # as in `typing`, which takes long to load
if TYPE_CHECKING:
    from typing import Any

LAUNCHER = ("ssh", "rsync")
NODE = tuple(
    "bash cat chown docker mkdir nvidia-smi ray rsync setsid sleep sudo ulimit uptime".split()
)
RUNTIMES = (
    "map[io.containerd.runc.v2:{runc [] <nil>} nvidia:{nvidia-container-runtime [] <nil>} "
    "runc:{runc [] <nil>}]"
)
"""Docker's answer on AWS's Deep Learning Base AMI, with or without a GPU."""
HOME = "/home/ray"
"""That of Ray's image."""


# ---- for the tests ---------------------------------------------------------------------------


def install(folder: str) -> dict[str, str]:
    """Write the replacements into a folder.

    Returns:
        The environment variables with which a process finds them. Set FAKE_GPU to "1" or "" for nodes
        with or without a GPU.
    """
    with open(__file__, encoding="utf-8") as file:
        module = file.read()
    for kind, names in (("launcher", LAUNCHER), ("node", NODE)):
        os.makedirs(f"{folder}/{kind}")
        with open(f"{folder}/{kind}/fake_ssh.py", "w", encoding="utf-8") as file:
            file.write(module)
        for name in names:
            with open(f"{folder}/{kind}/{name}", "w", encoding="utf-8") as file:
                file.write(f"#!{sys.executable} -ES\nimport fake_ssh\nfake_ssh.main()\n")
            os.chmod(f"{folder}/{kind}/{name}", 0o755)
    # ulimit is a builtin of bash, and a test may not raise its own limits.
    with open(f"{folder}/builtins.sh", "w", encoding="utf-8") as file:
        file.write('ulimit() { "$FAKE_FOLDER/node/ulimit" "$@"; }\n')
    return {
        "PATH": f"{folder}/launcher{os.pathsep}{os.environ['PATH']}",
        "FAKE_FOLDER": folder,
        "FAKE_GPU": "",
    }


def records(folder: str, host: str) -> "list[dict[str, Any]]":
    """Return all processes that ran on a node or copied files to it, in order.

    Each has `argv`, `container` (its name, or "" outside), `login` (whether a login shell ran it) and
    `env` (the variables RAY_* of the process).
    """
    import ast

    if not os.path.exists(f"{folder}/{host}.jsonl"):
        return []
    with open(f"{folder}/{host}.jsonl", encoding="utf-8") as log:
        return [ast.literal_eval(line) for line in log]


def line(record: "dict[str, Any]") -> str:
    """Format a record as a command line."""
    import shlex

    words = [f"{name}={shlex.quote(value)}" for name, value in sorted(record["env"].items())]
    prompt = f"{record['container']}$ " if record["container"] else ""
    return prompt + " ".join([*words, shlex.join(record["argv"])])


# ---- the processes ---------------------------------------------------------------------------


def note(argv: list[str], host: str | None = None) -> None:
    """Record this process."""
    record = {
        "argv": argv,
        "container": os.environ.get("FAKE_CONTAINER", ""),
        "login": "FAKE_LOGIN" in os.environ,
        "env": {
            name: value
            for name, value in os.environ.items()
            if name.startswith("RAY_") and host is None
        },
    }
    file = f"{os.environ['FAKE_FOLDER']}/{host or os.environ['FAKE_HOST']}.jsonl"
    with open(file, "a", encoding="utf-8") as log:
        log.write(f"{record!r}\n")


def node_folder(host: str | None = None) -> str:
    """Return the disk of a node."""
    return f"{os.environ['FAKE_FOLDER']}/nodes/{host or os.environ['FAKE_HOST']}"


def has(mark: str) -> bool:
    """Whether `remember(mark)` was called for the node."""
    return os.path.exists(f"{node_folder()}/{mark}")


def remember(mark: str) -> None:
    with open(f"{node_folder()}/{mark}", "w"):
        pass


def real_bash(text: str) -> list[str]:
    return ["/bin/bash", "--norc", "--noprofile", "-c", text]


def new_shell(**variables: str) -> dict[str, str]:
    """Return the environment of a shell that inherits only the variables of this module."""
    kept = {n: os.environ[n] for n in ("FAKE_FOLDER", "FAKE_GPU", "FAKE_HOST")}
    folder = os.environ["FAKE_FOLDER"]
    node = {
        "PATH": f"{folder}/node",
        "BASH_ENV": f"{folder}/builtins.sh",
        "HOME": node_folder(),
        "USER": "ubuntu",
    }
    return kept | node | variables


def ssh(words: list[str]) -> int:
    terminal = "-tt" in words
    while words[0].startswith("-"):
        words = words[2:] if words[0] in ("-i", "-o", "-L") else words[1:]
    os.environ["FAKE_HOST"] = words[0].rpartition("@")[2]
    os.makedirs(f"{node_folder()}/tmp", exist_ok=True)
    remember(".bashrc")
    # The only files that commands of cluster/aws.yaml write themselves.
    command = " ".join(words[1:]).replace(">/tmp/", f">{node_folder()}/tmp/")
    output, says = os.pipe()
    ended, lasts = os.pipe()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(says, 1)
        if terminal:
            os.dup2(1, 2)
        os.set_inheritable(lasts, True)
        os.execve("/bin/bash", real_bash(command), new_shell())
    os.close(says)
    os.close(lasts)
    with open(output, "rb") as stream:
        said = stream.read()
    os.read(ended, 1)  # returns when no process of the command has the other end any more
    sys.stdout.buffer.write(said.replace(b"\n", b"\r\n") if terminal else said)
    return os.waitstatus_to_exitcode(os.wait()[1])


def rsync(words: list[str]) -> int:
    source, (host, _, path) = words[-2], words[-1].partition(":")
    if "FAKE_HOST" not in os.environ:  # from the launcher or the head to a node
        host = host.rpartition("@")[2]
        note(["rsync", *words[2:]] if words[0] == "--rsh" else ["rsync", *words], host)
        target = node_folder(host) + path
    else:  # from a node into its container
        note(["rsync", *words])
        source, target = node_folder() + source, f"{node_folder()}/container{path}"
    if os.path.isfile(source):
        import shutil

        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(source, target)
    return 0


def docker(words: list[str]) -> int:
    if words[0] != "exec":
        note(["docker", *words])
    if not has("group-docker"):
        return fail("permission denied while trying to connect to the docker API")
    if words[0] == "info":
        print(RUNTIMES if "-f" in words else "Server Version: 28.0.0")
    elif words[0] == "run":
        remember("running")
    elif words[0] == "inspect" and "Config.Env" in words[2]:
        print(f'["PATH=/usr/bin", "HOME={HOME}"]')
    elif words[0] in ("inspect", "exec") and not has("running"):
        return fail(f"Error: No such object: {words[-1]}")
    elif words[0] == "inspect":
        print("true")
    elif words[0] == "exec":
        return docker_exec([word for word in words[1:] if word != "-it"])
    elif words[0] != "pull":
        return fail(f"docker: unknown command: docker {words[0]}")
    return 0


def docker_exec(words: list[str]) -> int:
    container, *command = words
    if command == ["printenv", "HOME"]:
        print(HOME)
        return 0
    if command[:2] != ["/bin/bash", "-c"]:
        return fail(f"exec of {command} is not emulated")
    return os.execve("/bin/bash", real_bash(command[2]), new_shell(FAKE_CONTAINER=container))


def bash(words: list[str]) -> int:
    if "-c" not in words:
        note(["bash", *words])
        return 0
    if "--login" in words:
        os.environ["FAKE_LOGIN"] = "1"
    return os.execv("/bin/bash", real_bash(words[-1]))


def sudo(words: list[str]) -> int:
    note(["sudo", *words])
    if words == ["usermod", "-aG", "docker", "ubuntu"]:
        remember("group-docker")
    return 0


def nvidia_smi(words: list[str]) -> int:
    note(["nvidia-smi", *words])
    return 0 if os.environ["FAKE_GPU"] else fail("couldn't communicate with the NVIDIA driver")


def sleep(words: list[str]) -> int:
    return 0


def fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def main() -> None:
    name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
    does = (ssh, rsync, docker, bash, sudo, nvidia_smi, sleep)
    for function in does:
        if function.__name__.replace("_", "-") == name:
            sys.exit(function(words))
    note([name, *words])
