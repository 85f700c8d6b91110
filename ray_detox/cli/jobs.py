"""The command `ray-detox submit`: the main job on a cluster, through Ray's job server.

    here                                             head of the cluster
    settings read, mistakes found
    package, recipe, --with ...   -- one zip -->     folder that the job starts in, on every node
    run id, which is the job's id -- HTTP ----->     python -m ray_detox run ... --output ~/runs
    log, printed as it comes      <-------------     output of the driver
    exit code                     <-------------     of the driver

The job outlives this process. Ctrl-C only stops following its log; `--stop`, like `ray job stop`,
ends the job after a checkpoint. Only the package and the files named on the command line are sent,
never the rest of the checkout.
"""

import argparse
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray_detox
from ray_detox.addresses import credentials_in, has_credentials
from ray_detox.cli.output import path, print_error
from ray_detox.errors import ConfigError
from ray_detox.machine import is_private, proxy_in_use, reach_directly
from ray_detox.recipes.loading import (
    apply_override,
    is_recipe_file,
    load_config,
    split_words,
)
from ray_detox.recipes.names import JOB_VARIABLE, expand
from ray_detox.runs.folder import new_run_id
from ray_detox.runs.printable import escape_control
from ray_detox.store.protocol import check_run_id

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

Add = Callable[[str, Any, str], argparse.ArgumentParser]

ADDRESS = "http://127.0.0.1:8265"
LARGEST = 90 * 2**20
"""Most bytes that are sent; Ray's job server takes 100 MiB in one request."""

STOP_S = 120
"""Time in which a driver can write its checkpoint after `ray job stop`, before Ray kills it."""

_SECRET = re.compile(
    "TOKEN|SECRET|PASS(W|PHRASE)|PWD|CREDENTIAL|_KEY|APIKEY|PRIVATE|DATABASE_URL|DSN|CONNECTION_?STRING|"
    "SIGNATURE|(^|_)(KEY|PASS|SAS|JWT)($|_)"
)
"""Names of variables whose value is likely a secret."""

HTTP_TIMEOUT_S = 10.0
"""Longest wait for an answer from the address."""

READY_S = 60.0
"""Longest wait for a head that was just started to accept its first job."""

LOST_S = 120.0
"""Longest wait for a job server that stopped answering while its log was followed."""

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def add_verbs(add: Add) -> None:
    """Add the command of this module to the command line."""
    sub = add("submit", _submit, "Run the main job on a cluster, through Ray's job server.")
    sub.add_argument(
        "words",
        nargs="*",
        default=(),
        metavar="RECIPE|SETTING",
        help="as for run: a recipe and section.name=value",
    )
    sub.add_argument(
        "--run-id", metavar="ID", help="name of the run; default: recipe, time and a random part"
    )
    sub.add_argument("--resume", metavar="RUN", help="continue a run from its newest checkpoint")
    sub.add_argument(
        "--trust-functions",
        action="store_true",
        help="with --resume: as for run, if the run started on another head",
    )
    sub.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS,
        metavar="URL",
        help=f"address of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS or {ADDRESS}",
    )
    sub.add_argument(
        "--output", metavar="DIR", help="folder on the head where runs are kept; default: ~/runs"
    )
    sub.add_argument(
        "--with",
        dest="extra",
        action="append",
        default=[],
        type=path,
        metavar="PATH",
        help="send a file or folder along, such as a module with reward functions; "
        "may be repeated, and is needed again with --resume",
    )
    sub.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a variable in all processes of the run; everybody who sees the dashboard can "
        "read it; may be repeated",
    )
    sub.add_argument("--no-wait", action="store_true", help="return without following the log")
    sub.add_argument("--follow", metavar="RUN", help="follow the log of a submitted run")
    sub.add_argument("--stop", metavar="RUN", help="end a submitted run after a checkpoint")


def _submit(args: argparse.Namespace) -> int:
    try:
        if args.follow is not None or args.stop is not None:
            run_id = args.stop if args.follow is None else args.follow
            return _look_after(args, check_run_id(run_id))
        return _send_and_follow(args)
    except OSError as error:  # includes the errors of requests
        reason = str(error).partition("\n")[0][:200]
        print_error(f"cut off from {args.address} ({reason}).")
        return 1


def _send_and_follow(args: argparse.Namespace) -> int:
    run_id, words, files = _read(args)
    environment = _environment(args.env)
    _say("run", run_id)
    client = _reach(args.address)
    job_id = _job_id(client, run_id, args)
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ray-detox-") as name:
        size = _gather(Path(name), files)
        _send(client, job_id, run_id, words, args.output, Path(name), environment)
    kept = args.output or "~/runs"
    _say(
        "job", f"{job_id}, at {args.address}; {size / 2**20:.1f} MiB sent; runs are in {kept} there"
    )
    if args.no_wait:
        _say("follow", _command(args, "--follow", run_id))
        _say("stop", _command(args, "--stop", run_id))
        return 0
    return _follow(client, job_id, run_id, args)


def _look_after(args: argparse.Namespace, run_id: str) -> int:
    """Follow or stop a run that was submitted before."""
    if args.words or args.run_id or args.resume or None not in (args.follow, args.stop):
        raise ConfigError("--follow and --stop name a run, and take nothing else but --address.")
    client = _reach(args.address)
    jobs = _jobs(client, run_id)
    if not jobs:
        raise ConfigError(f"No job at {args.address} has run {run_id!r}.")
    job = jobs[-1]
    if args.follow:
        return _follow(client, job.submission_id, run_id, args)
    if job.status in ENDED:
        raise ConfigError(f"The job of run {run_id!r} has ended already ({job.status.lower()}).")
    client.stop_job(job.submission_id)
    _say("job", f"{job.submission_id} was told to stop, and writes a checkpoint first")
    # This loop ends: Ray kills a driver that has not ended after STOP_S.
    while (status := client.get_job_status(job.submission_id)) not in ENDED:
        time.sleep(1)
    _say("job", f"{status.lower()}; go on with {_command(args, '--resume', run_id)}")
    return 0


def _command(args: argparse.Namespace, option: str, run_id: str) -> str:
    """Return the command with which the user handles a submitted run."""
    command = os.environ.get("RAY_DETOX_SUBMIT", "ray-detox submit")  # set by scripts/submit.sh
    at = f" --address {shlex.quote(args.address)}" if args.address != ADDRESS else ""
    return f"{command} {option} {run_id}{at}"


def _say(what: str, text: str) -> None:
    print(f"{what:<9} {escape_control(text)}", flush=True)


def _read(args: argparse.Namespace) -> tuple[str, list[str], list[Path]]:
    """Return the run's id, the arguments of `ray-detox run` on the head, and the files to send."""
    files = [Path(ray_detox.__file__).parent, *args.extra]
    if args.resume is not None:
        if args.run_id is not None:
            raise ConfigError("--run-id and --resume exclude each other; --resume names the run.")
        for word in args.words:
            apply_override({}, word)
            if has_credentials(word):  # the dashboard shows a job's command
                raise ConfigError(credentials_in(word.partition("=")[0]))
        trust = ["--trust-functions"] if args.trust_functions else []
        return check_run_id(args.resume), ["--resume", args.resume, *trust, *args.words], files
    recipe, settings = split_words(args.words)
    config = load_config(recipe, settings)
    if config.cluster.address != "auto":
        raise ConfigError(
            f"cluster.address={config.cluster.address} cannot be set for a job: it runs on the "
            "cluster that --address names."
        )
    if is_recipe_file(recipe):
        files.append(expand(recipe))
        recipe = Path(recipe).name
    run_id = check_run_id(new_run_id(config.recipe) if args.run_id is None else args.run_id)
    return run_id, [recipe, *settings, "--run-id", run_id], files


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    # Ray's default kills a driver after 3 seconds, before it has finished its step and stored it.
    environment = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
        "WR_ENGINE": "python",
        JOB_VARIABLE: "1",
    }
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--env {name!r} is not a variable; expected NAME=VALUE.")
        if _SECRET.search(name.upper()) or has_credentials(value):
            raise ConfigError(
                f"--env {name} would be shown on the dashboard. Give the nodes access in another "
                "way: a role of the cloud, or a file that only they can read."
            )
        environment[name] = value
    return environment


def _reach(address: str) -> "JobSubmissionClient":
    """Return a client of the job server, which must answer and run this version of Ray."""
    if has_credentials(address, is_host=True):
        raise ConfigError(credentials_in("--address"))
    if not re.fullmatch(r"https?://[^/\s]+/?", address):
        raise ConfigError(
            f"--address {address!r} is not a job server; expected the dashboard's address, "
            f"such as {ADDRESS}."
        )
    import logging
    import urllib.error
    import urllib.parse
    import urllib.request

    hint = (
        "Start a head with scripts/head.sh, or leave `ray dashboard cluster/aws.yaml` open "
        "in another terminal."
    )
    host = urllib.parse.urlsplit(address).hostname or ""
    if is_private(host):  # no proxy reaches it: this machine, or one of the own network
        reach_directly(host)
    try:
        # Ray's client has no timeout: it waits for ever for a server that never answers.
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=HTTP_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # it answers, and requires a token
    except (OSError, ValueError):
        proxy = proxy_in_use()
        if proxy is not None and not is_private(host):
            hint = f"It was asked through {proxy}; if it is reached without, add {host} to no_proxy. {hint}"
        raise ConfigError(f"No job server answers at {address}. {hint}") from None

    token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_TOKEN" not in os.environ:
        _warn_if_shared(file)
    if (token or file.is_file()) and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"  # read once, when Ray is imported
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in (
        "dashboard.modules.dashboard_sdk",
        "dashboard.modules.job.sdk",
        "_private.runtime_env.packaging",
    ):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()  # the first request that needs the token
    except AuthenticationError:
        raise ConfigError(
            f"The cluster at {address} did not accept this machine's token. Put the cluster's token "
            "into ~/.ray/auth_token, and set RAY_AUTH_MODE=token."
        ) from None
    except (RuntimeError, ConnectionError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ConfigError(f"{address} is not a job server of Ray ({reason}). {hint}") from None
    theirs = client._server_ray_version
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ConfigError(
            f"The cluster runs Ray {theirs}, this machine {ray.__version__}. Start the cluster with "
            "the version in constraints.txt (an image's tag begins with it), or use that one here."
        )
    return client


def _warn_if_shared(token: Path) -> None:
    """Print a warning if other users of this machine can read the file with the token."""
    if token.is_file() and token.stat().st_mode & 0o077:
        _say(
            "warning",
            f"other users of this machine can read the token in {token}, and with it run code on the "
            f"cluster. Make it private: chmod 600 {shlex.quote(str(token))}",
        )


def _jobs(client: "JobSubmissionClient", run_id: str) -> "list[JobDetails]":
    """Return the jobs that have worked on a run, oldest first."""
    jobs = [job for job in client.list_jobs() if (job.metadata or {}).get("run_id") == run_id]

    def age(job: "JobDetails") -> tuple[int, int]:
        # By the number in the id of `_job_id`: the head's clock may have jumped back.
        number = (job.submission_id or "").removeprefix(f"{run_id}-resumed-")
        return int(number) if number.isdecimal() else 0, job.start_time or 0

    return sorted(jobs, key=age)


def _job_id(client: "JobSubmissionClient", run_id: str, args: argparse.Namespace) -> str:
    """Return an unused id for the job: the id of its run, with a number if it resumes the run."""
    jobs = _jobs(client, run_id)
    live = [job for job in jobs if job.status not in ENDED]
    if live:
        raise ConfigError(
            f"Run {run_id!r} is being worked on (job {live[0].submission_id}, "
            f"{live[0].status.lower()}). Follow it with {_command(args, '--follow', run_id)}, or end "
            f"it first with {_command(args, '--stop', run_id)}."
        )
    if args.resume is not None:
        return f"{run_id}-resumed-{len(jobs)}"
    if jobs:
        raise ConfigError(
            f"A job has had run {run_id!r} ({jobs[-1].status.lower()}). Choose another --run-id, or "
            f"go on with it: {_command(args, '--resume', run_id)}."
        )
    return run_id


def _gather(folder: Path, files: Sequence[Path]) -> int:
    """Copy the files of a job into a folder of its own, and return their size in bytes."""
    import shutil

    for file in files:
        if not file.exists():
            raise ConfigError(f"--with {file} does not exist; expected a file or a folder.")
        copy = folder / file.resolve().name
        if copy.exists():
            raise ConfigError(f"--with {file}: something named {copy.name!r} is sent already.")
        try:
            if file.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", ".git", ".venv")
                shutil.copytree(file, copy, ignore=ignore)
            else:
                shutil.copy2(file, copy)
        except OSError as error:
            raise ConfigError(f"--with {file} cannot be sent: {_reason(error)}.") from error
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > LARGEST:
        most = max(sizes, key=lambda path: sizes[path])
        raise ConfigError(
            f"{total / 2**20:.0f} MiB would be sent, and {LARGEST / 2**20:.0f} can be; the largest file "
            f"is {most.relative_to(folder)} ({sizes[most] / 2**20:.0f} MiB). Put data and models where the "
            "nodes can read them, such as s3://, and name that in data.path or policy.model."
        )
    return total


def _reason(error: OSError) -> str:
    """Return why a file, or the first file of a folder, could not be copied."""
    if error.strerror is None and error.args and isinstance(error.args[0], list):
        source, _, reason = error.args[0][
            0
        ]  # shutil.copytree gives source, target and reason of each
        return f"{source}: {str(reason).partition('] ')[2] or reason}"
    return f"{error.filename}: {error.strerror}"


def _send(
    client: "JobSubmissionClient",
    job_id: str,
    run_id: str,
    words: Sequence[str],
    output: str | None,
    folder: Path,
    environment: dict[str, str],
) -> None:
    command = shlex.join(["python", "-m", "ray_detox", "run", *words])
    # The home folder on the head, so the shell there expands it.
    command += ' --output "$HOME"/runs' if output is None else f" --output {shlex.quote(output)}"
    # A .gitignore says what a repository leaves out, and not what a job needs.
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"
    deadline = time.monotonic() + READY_S
    while True:
        try:
            client.submit_job(
                entrypoint=command,
                submission_id=job_id,
                runtime_env={"working_dir": str(folder), "env_vars": environment},
                metadata={"run_id": run_id},
            )
            return
        except RuntimeError as error:
            reason = str(error).strip().rpartition("\n")[2][:300]
        if "already" in reason:
            raise ConfigError(f"Job {job_id} was sent by somebody else just now.")
        # A head that was just started answers some seconds before it can run a job.
        if "No available agent" not in reason:
            raise ConfigError(f"The job server did not take the job: {reason}")
        if time.monotonic() > deadline:
            raise ConfigError(
                f"The cluster's head takes no jobs, even after {READY_S:.0f} s. Another Ray on that machine "
                "may hold a port it needs: start it with --dashboard-agent-listen-port=0."
            )
        time.sleep(1)


def _follow(
    client: "JobSubmissionClient", job_id: str, run_id: str, args: argparse.Namespace
) -> int:
    """Print the log until the job has ended, and return its exit code."""
    again = f"follow it with {_command(args, '--follow', run_id)}"
    try:
        job = _print_to_end(client, job_id)
    except KeyboardInterrupt:
        _say("\njob", f"goes on; {again}, stop it with {_command(args, '--stop', run_id)}")
        return 128 + signal.SIGINT
    except ConnectionError as error:
        _say("job", f"{error} It may go on; {again}.")
        return 1
    return _ended(job, _command(args, "--resume", run_id))


def _print_to_end(client: "JobSubmissionClient", job_id: str) -> "JobDetails":
    """Print the log until the job has ended, and reconnect when the connection breaks."""
    import asyncio

    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    log, silent_since = _Log(), None
    while True:
        try:
            asyncio.run(log.follow(client, job_id))
            job = client.get_job_info(job_id)
            if job.status in ENDED:
                log.print_new(client.get_job_logs(job_id))  # the end, which the stream may lack
                return job
            silent_since = None
        except AuthenticationError:
            raise ConnectionError("The cluster does not accept the token any more.") from None
        except (OSError, RuntimeError, ClientError) as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > LOST_S:
                raise ConnectionError(
                    f"Its job server has not answered for {LOST_S:.0f} s ({type(error).__name__})."
                ) from None
        time.sleep(1)


class _Log:
    """Prints each character of a job's log once; the server always sends it from the beginning."""

    def __init__(self) -> None:
        self.printed = 0

    def print_new(self, text: str, start: int = 0) -> None:
        """Print the new part of `text`, which begins at character `start` of the log."""
        new = text[max(self.printed - start, 0) :].replace("\r\n", "\n").replace("\r", "\n")
        print(escape_control(new), end="", flush=True)
        self.printed = max(self.printed, start + len(text))

    async def follow(self, client: "JobSubmissionClient", job_id: str) -> None:
        """Print until the server ends the connection."""
        seen = 0
        async for text in client.tail_job_logs(job_id):
            self.print_new(text, seen)
            seen += len(text)


def _ended(job: "JobDetails", go_on: str) -> int:
    """Print how the job ended, and return the exit code of its driver."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        _say("job", f"stopped; go on with {go_on}")
        return 128 + signal.SIGTERM
    code = job.driver_exit_code
    if code is None or code < 0:
        # The driver never ran or was killed, so only Ray knows the reason.
        _say("job", f"failed: {(job.message or 'no reason was given').strip()[:2000]}")
    if code != 2:
        _say("job", f"ended early; go on with {go_on}")
    return code if code is not None and code > 0 else 1
