"""The lease on a run: one writer at a time, in folders, S3 and other storage."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from ray_detox.errors import ConfigError
from ray_detox.runs import conditional, lease
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, CheckpointWriter
from ray_detox.runs.conditional import Conflict, versioned_file
from ray_detox.runs.lease import GuardedStorage, LeaseLost, create, read_record, take
from ray_detox.runs.record import Taking, record_from_json
from ray_detox.runs.storage import Storage, StorageError
from tests.emulators import emulator
from tests.environment import python_path

STALE_S = 0.5


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Short times between signs of life."""
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "WATCH_S", 0.02)


@contextlib.contextmanager
def bucket(name):
    """The form of an address in an emulator's bucket."""
    with emulator(name) as endpoint, pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(variable, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="runs")
        yield f"s3://runs/{{}}?endpoint_override={endpoint.partition('//')[2]}&scheme=http"


@pytest.fixture(scope="module", params=["folder", "file", "memory", "moto", "ministack"])
def form(request, tmp_path_factory):
    """The form of the address of a storage."""
    kind = request.param
    if kind in ("moto", "ministack"):
        with bucket(kind) as found:
            yield found
    else:
        folder = tmp_path_factory.mktemp("storage")
        forms = {"folder": f"{folder}/{{}}", "file": f"file://{folder}/{{}}"}
        yield forms.get(kind, f"memory://{folder}/{{}}")


@pytest.fixture
def storage(form, tmp_path):
    """The storage of a run."""
    return Storage(form.format(f"of-{tmp_path.name}"))


@pytest.fixture
def held(storage):
    """A new run that this process writes."""
    found = create(storage, "first")
    yield found
    found.release()


def other_writer(storage, **changes):
    """Make the record that of a process elsewhere, which gives no sign of life."""
    file = versioned_file(storage)
    version, content = file.read()
    record = record_from_json(content, "it")
    writer = replace(record.writer, host="elsewhere", pid=7, born="", **changes)
    file.replace(replace(record, writer=writer).to_json(), version)


def silence(found):
    """End the thread of a lease, as if its process were paused."""
    found._released.set()
    found._thread.join()


def test_a_run_is_created_once(storage, held):
    record = read_record(storage)

    assert (record.token, record.takings) == (1, (Taking(token=1, step=0),))
    with pytest.raises(Conflict):
        create(storage, "first")


def test_a_run_that_is_being_written_is_refused(storage, held):
    said = []

    with pytest.raises(
        ConfigError, match=r"^Run 'first' is being written by process \d+ on .*\. S"
    ):
        take(storage, "first", said.append, stale_s=30)

    assert said[0].startswith("run first is held by process")
    held.guard.check()


def test_a_run_that_was_released_is_taken_at_once_with_the_next_token(storage):
    first = create(storage, "first")
    first.release()
    said = []

    second = take(storage, "first", said.append)

    assert (second.record.token, second.record.run) == (2, first.record.run)
    assert said == []
    with pytest.raises(
        LeaseLost, match=r"taken over by process .* \(taking 2, this was taking 1\)"
    ):
        first.guard.check()
    second.release()


def test_the_time_of_a_run_is_that_of_all_its_processes(storage):
    """Also of one that was killed, up to its last beat."""
    first, measured = create(storage, "first"), {"ingest": 2.0, "train": 10.0}
    first.measure(lambda: measured)
    while read_record(storage).seconds != measured:
        time.sleep(0.05)
    silence(first)
    other_writer(storage)

    second = take(storage, "first", print, stale_s=0)
    second.measure(lambda: {"train": 1.5, "evaluate": 4.0})

    assert second.seconds() == {"ingest": 2.0, "train": 11.5, "evaluate": 4.0}
    second.release()
    assert read_record(storage).seconds == second.seconds()
    third = take(storage, "first", print)
    assert third.seconds() == second.seconds()
    third.release()


def test_a_silent_writer_loses_the_run_and_writes_nothing_more(storage, held):
    guarded = GuardedStorage(held.guard)
    guarded.write("a/kept", b"first")
    silence(held)
    other_writer(storage)
    said = []

    second = take(storage, "first", said.append, stale_s=STALE_S)

    assert said[-1].startswith("run first taken over from process 7 on elsewhere")
    assert said[-1].endswith("gave no sign of life for 0.5 s")
    for change in (
        lambda: guarded.write("a/kept", b"second"),
        lambda: guarded.delete("a/kept"),
        lambda: held.update(step=3),
    ):
        with pytest.raises(LeaseLost, match=r"Run 'first' was taken over"):
            change()
    assert storage.read("a/kept") == b"first"
    GuardedStorage(second.guard).write("a/kept", b"second")
    assert storage.read("a/kept") == b"second"
    second.release()


def test_of_two_that_were_given_one_token_the_last_holds_the_run():
    storage = Storage("memory://one-token")  # which cannot compare
    first = create(storage, "first")
    silence(first)
    writer = replace(first.record.writer, id="another")
    storage.write(conditional.NAME, replace(first.record, writer=writer).to_json())

    for change in (first.guard.check, lambda: first.update(step=3)):
        with pytest.raises(LeaseLost, match=r"Run 'first' was taken over by process \d+ on"):
            change()


def test_the_thread_of_a_lost_lease_notices(storage, held):
    file = versioned_file(storage)

    def steal():
        while True:
            version, content = file.read()
            record = record_from_json(content, "it")
            try:
                file.replace(replace(record, token=2).to_json(), version)
                return
            except Conflict:
                continue

    steal()
    held._thread.join(10)

    with pytest.raises(LeaseLost):
        held.check()


def test_signs_of_life_and_changes_of_one_process_do_not_disturb_each_other(storage, held):
    for step in range(20):
        held.update(step=step)

    deadline = time.monotonic() + 10
    before = read_record(storage).beat
    while read_record(storage).beat == before and time.monotonic() < deadline:
        time.sleep(0.02)
    record = read_record(storage)
    assert record.step == 19
    assert record.beat > before


def test_a_record_that_is_gone_is_a_failure_of_the_storage(storage, held):
    silence(held)
    storage.delete(conditional.NAME)

    for change in (held.guard.check, lambda: GuardedStorage(held.guard).write("a", b"")):
        with pytest.raises(StorageError, match=r"no longer has the run's run\.json"):
            change()
    with pytest.raises(ConfigError, match=r"has no run\.json, so no run can be resumed there"):
        take(storage, "first", print)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b'{"format": 2}',
        b'{"format": 1, "run": 3}',
        b"\xff\x00",
        b"{}",
    ],
)
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    with pytest.raises(
        ConfigError, match=r"^here is damaged, or of another version .* a new run\.$"
    ):
        record_from_json(content, "here")


def test_only_one_of_many_processes_takes_a_run(storage):
    create(storage, "first").release()
    found, refused = [], []

    def want():
        try:
            found.append(take(storage, "first", lambda line: None, stale_s=5))
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    holders = [one for one in found if one._lost is None and _still_holds(one)]
    assert len(holders) == 1
    if not storage.address.startswith("memory"):  # which cannot compare
        assert (len(found), len(refused)) == (1, 5)
    for one in found:
        one.release()


def _still_holds(one):
    try:
        one.guard.check()
    except LeaseLost:
        return False
    return True


# ---- real processes ------------------------------------------------------------------------------

WRITER = """
import sys, time
from ray_detox.runs import lease
from ray_detox.runs.storage import Storage
lease.BEAT_S = 0.1
held = lease.create(Storage(sys.argv[1]), "first")
guarded = lease.GuardedStorage(held.guard)
number = 0
print("begun", flush=True)
try:
    while True:
        number += 1
        guarded.write("number", str(number).encode())
        time.sleep(0.01)
except lease.LeaseLost as error:
    print(error, flush=True)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that writes a run all the time, and its storage."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": python_path(Path(__file__).parents[1])},
    )
    assert process.stdout.readline() == "begun\n"
    yield process, Storage(str(tmp_path / "run"))
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_paused_process_that_goes_on_stops_with_a_sentence_and_changes_nothing(writer):
    process, storage = writer
    while True:  # until it is not paused within a write, while which nobody can take the run
        process.send_signal(signal.SIGSTOP)
        try:
            with conditional.locked(Path(storage.address) / conditional.NAME):
                break
        except StorageError:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.013)
    second = take(storage, "first", lambda line: None, stale_s=STALE_S)
    GuardedStorage(second.guard).write("number", b"mine")

    process.send_signal(signal.SIGCONT)
    said = process.stdout.read()

    assert process.wait(30) == 0
    assert "was taken over by process" in said
    assert storage.read("number") == b"mine"
    second.release()


@pytest.fixture(autouse=True)
def short_lock(monkeypatch):
    monkeypatch.setattr(conditional, "LOCK_TIMEOUT_S", 1.0)


def test_a_killed_process_loses_the_run_at_once(writer):
    process, storage = writer
    process.kill()
    process.wait()
    said = []

    second = take(storage, "first", said.append, stale_s=600)

    assert len(said) == 1
    assert said[0].endswith("has ended")
    second.release()


def test_a_service_without_conditional_writes_is_compared_here():
    with bucket("moto") as form:
        storage = Storage(form.format("plain"))
        file = versioned_file(storage)
        client = file._opened()
        put = client.put_object

        def refuse_conditions(**arguments):
            if {"IfMatch", "IfNoneMatch"} & arguments.keys():
                raise ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
            return put(**arguments)

        client.put_object = refuse_conditions
        first = file.replace(b"1", None)
        second = file.replace(b"2", first)

        assert file.read() == (second, b"2")
        for stale in (None, first):
            with pytest.raises(Conflict):
                file.replace(b"3", stale)


def test_the_threads_of_a_process_do_not_wait_for_each_other(tmp_path):
    file = tmp_path / "run.json"
    entered = []

    def enter():
        with conditional.locked(file):
            entered.append(True)

    with conditional.locked(file):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(30)

    assert entered == [True]
    assert conditional._locks[str(tmp_path / "run.lock")].threads == 0


# ---- checkpoints -----------------------------------------------------------------------------------


def checkpoint(step, by):
    return Checkpoint(step, {"state.json": f"{step} {by}".encode(), "metrics.jsonl": b""})


def test_a_checkpoint_that_was_written_after_the_run_was_lost_does_not_count(tmp_path):
    storage = Storage(str(tmp_path))
    first = CheckpointStore(storage, 9, [Taking(1, 0)])
    for step in (1, 2):
        first.save(checkpoint(step, "first"))
    second = CheckpointStore(storage, 9, [Taking(1, 0), Taking(2, 2)])
    second.save(checkpoint(2, "second"))
    first.save(checkpoint(3, "first"))
    first.save(checkpoint(9, "first"))

    assert second.steps() == [1, 2]
    assert second.newest().files["state.json"] == b"2 second"

    second.save(checkpoint(3, "second"))

    assert second.load(3).files["state.json"] == b"3 second"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000002.2", "step-00000003.2"]


def test_a_writer_that_has_lost_the_run_deletes_no_checkpoint_of_the_next_one(tmp_path):
    storage = Storage(str(tmp_path))
    second = CheckpointStore(storage, 3, [Taking(1, 0), Taking(2, 0)])
    for step in (1, 2, 3):
        second.save(checkpoint(step, "second"))

    CheckpointStore(storage, 1, [Taking(1, 0)]).save(checkpoint(9, "first"))

    assert [second.load(step).files["state.json"] for step in second.steps()] == [
        f"{step} second".encode() for step in (1, 2, 3)
    ]


def test_the_checkpoint_thread_passes_on_that_the_run_is_lost(tmp_path):
    storage = Storage(str(tmp_path))
    held = create(storage, "first")
    writer = CheckpointWriter(CheckpointStore(GuardedStorage(held.guard)), None)
    silence(held)
    other_writer(storage)
    second = take(storage, "first", lambda line: None, stale_s=STALE_S)

    writer.put(checkpoint(1, "first"))

    with pytest.raises(LeaseLost):
        writer.flush(30)
    with pytest.raises(LeaseLost):
        writer.put(checkpoint(2, "first"))
    assert storage.names("checkpoints") == []
    second.release()


def test_which_addresses_are_folders_of_this_machine():
    assert Storage("memory://a/b").local_folder is None
    assert Storage("file:///a%20b").local_folder == Path("/a b")
