"""Checkpoints in storage: complete or ignored; the newest and the best kept; never delay training."""

import json
import math
import os
import resource
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import boto3
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from ray_detox.errors import ConfigError
from ray_detox.records import Objective
from ray_detox.runs import checkpoint_store
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, CheckpointWriter
from ray_detox.runs.storage import (
    Storage,
    StorageError,
    check_storage,
    join_address,
    open_address,
    write_atomic,
)
from tests.emulators import emulator


def made(step, objective=None, key=""):
    """A checkpoint of two files."""
    files = {
        "state.json": b'{"step": %d}' % step,
        "adapter/adapter_model.safetensors": bytes([step]) * 5000,
    }
    return Checkpoint(step, files, None if objective is None else Objective(objective, key))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(folder):
    return CheckpointStore(Storage(str(folder)), keep=2)


def test_a_checkpoint_survives_the_storage_unchanged(store, folder):
    store.save(made(3, objective=1.5, key="a"))

    again = CheckpointStore(Storage(str(folder)))
    assert again.newest() == made(3, objective=1.5, key="a")
    assert again.load(3) == made(3, objective=1.5, key="a")


def test_an_empty_storage_has_no_checkpoint_and_no_folder(store, folder):
    assert store.newest() is None
    assert store.best() is None
    assert not folder.exists()


@pytest.mark.parametrize(
    ("objectives", "left"),
    [
        ([None, None, None, None], [2, 3]),
        ([None, 5.0, 1.0, 2.0, 3.0], [1, 3, 4]),
        ([None, 1.0, 2.0, 3.0, 4.0], [3, 4]),
        ([None, 2.0, 2.0, 1.0, 1.0], [2, 3, 4]),
        ([math.nan, 2.0, math.inf, 1.0, math.nan], [1, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(store, folder, objectives, left):
    for step, objective in enumerate(objectives):
        store.save(made(step, objective))

    assert store.steps() == left
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {f"step-{step:08d}" for step in left}


def test_the_best_checkpoint_of_an_earlier_process_is_kept(store, folder):
    for step, objective in enumerate([None, 5.0, 1.0]):
        store.save(made(step, objective))
    later = CheckpointStore(Storage(str(folder)), keep=1)

    later.save(made(3, 0.0))

    assert later.best() == 1
    assert later.steps() == [1, 3]


def test_only_objectives_with_the_key_of_the_newest_measured_checkpoint_are_compared(store, folder):
    best = []
    for step, (objective, key) in enumerate(
        [(5.0, "a"), (1.0, "a"), (None, "b"), (2.0, "b"), (math.nan, "c"), (1.0, "b"), (0.0, "b")]
    ):
        store.save(made(step, objective, key))
        best.append(store.best())

    assert best == [0, 0, 0, 3, 3, 3, 3]
    assert store.steps() == [3, 5, 6]
    assert CheckpointStore(Storage(str(folder))).best() == 3


# ---- damage ----------------------------------------------------------------------------------


def cut_short(file):
    file.write_bytes(file.read_bytes()[:100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("adapter/adapter_model.safetensors", cut_short, "is 100 bytes, not the 5,000 bytes"),
        (
            "adapter/adapter_model.safetensors",
            flip_a_bit,
            "is damaged: adapter/adapter_model.safetensors is 5,000 bytes",
        ),
        (
            "adapter/adapter_model.safetensors",
            lambda file: file.unlink(),
            "adapter/adapter_model.safetensors is missing",
        ),
        ("manifest.json", cut_short, "is incomplete: it has no valid manifest"),
        ("manifest.json", lambda file: file.unlink(), "is incomplete: it has no valid manifest"),
        (
            "manifest.json",
            lambda file: file.write_text("[]"),
            "is incomplete: it has no valid manifest",
        ),
    ],
)
def test_a_damaged_checkpoint_is_ignored_and_named(store, folder, name, damage, sentence):
    store.save(made(1))
    store.save(made(2))
    damage(folder / "checkpoints/step-00000002" / name)
    said = []

    found = store.newest(on_damage=said.append)

    assert found == made(1)
    assert len(said) == 1
    assert "The checkpoint of step 2" in said[0]
    assert sentence in said[0]
    assert said[0].endswith("The run ignores it.")


def changed(**changes):
    """The manifest of step 2 with other values; `...` leaves one out."""
    files = {"state.json": {"bytes": 13, "sha256": "0" * 64}}
    about = {"step": 2, "objective": {"value": 1.5, "key": "a"}, "files": files} | changes
    return json.dumps({name: value for name, value in about.items() if value is not ...})


@pytest.mark.parametrize(
    "manifest",
    [
        *(
            "[]",
            "[2]",
            "2",
            '"step"',
            "null",
            "",
            "{}",
            "NaN",
            "{",
            "\x00",
            "9" * 5000,
            "[" * 100_000,
        ),
        *(changed(step=step) for step in (1, 2.0, "2", None, True, [2], 10**30, ...)),
        *(changed(objective=value) for value in ("1.5", [1.5], True, 1.5, {"a": 1.0}, ...)),
        *(
            changed(objective={"value": value, "key": "a"})
            for value in ("1.5", [1.5], True, 10**400, None)
        ),
        *(changed(objective={"value": 1.5, "key": key}) for key in (1, ["a"], True, None)),
        changed(objective={"value": 1.5, "key": "a", "more": 1}),
        *(changed(files=files) for files in (None, 3, "state.json", ["state.json"], ...)),
        *(
            changed(files={"state.json": digest})
            for digest in (
                *(None, 13, "0", [13, "0"], {}, {"bytes": 13}, {"sha256": "0"}),
                *({"bytes": size, "sha256": "0"} for size in ("13", None, 13.0, True, [13])),
                *({"bytes": 13, "sha256": sha256} for sha256 in (0, None, ["0"])),
                {"bytes": 13, "sha256": "0", "mode": 0},
            )
        ),
    ],
    ids=lambda text: text[:60],
)
def test_a_manifest_that_is_not_ours_makes_a_checkpoint_incomplete(store, folder, manifest):
    store.save(made(1, 1.0, "a"))
    store.save(made(2, 2.0, "a"))
    (folder / "checkpoints/step-00000002/manifest.json").write_text(manifest)
    later, said = CheckpointStore(Storage(str(folder)), keep=1), []

    assert later.newest(on_damage=said.append) == made(1, 1.0, "a")
    assert [" it has no valid manifest." in text for text in said] == [True]
    assert later.complete() == [1]
    assert later.best() == 1
    with pytest.raises(StorageError, match="no valid manifest"):
        later.load(2)
    later.save(made(3, 3.0, "a"))
    assert later.steps() == later.complete() == [3]


def test_a_step_that_is_true_is_not_step_1(store, folder):
    store.save(made(1))
    manifest = folder / "checkpoints/step-00000001/manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": true'))

    assert CheckpointStore(Storage(str(folder))).complete() == []


@pytest.mark.parametrize("objective", [None, -1.5, 0.0, math.inf, 1e300])
def test_a_manifest_of_ours_is_valid(store, folder, objective):
    store.save(made(2, objective, "a"))

    assert CheckpointStore(Storage(str(folder))).newest() == made(2, objective, "a")


STRANGE_FOLDERS = [
    *("step-00000001.bak", "old-step-00000001", "step-x", "step-", "step-1", "step-0000001"),
    *("step-000000001", "step--0000001", "step-0000000x", "step-+0000001", "step-00000001 "),
    *("step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661", "Step-00000001", "tmp"),
]
STRANGE_FILES = ["step-00000000", "step-00000099", "notes.txt", "step-00000002.part"]


def test_names_that_are_not_ours_stay_and_do_not_count(store, folder):
    strange = {}
    for name in STRANGE_FOLDERS:
        strange[folder / "checkpoints" / name / "manifest.json"] = changed(
            objective={"value": 99.0, "key": ""}
        )
    for name in STRANGE_FILES:
        strange[folder / "checkpoints" / name] = "mine"
    for file, text in strange.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    assert store.newest() is store.best() is None
    for step in range(1, 5):
        store.save(made(step))

    assert store.steps() == store.complete() == [3, 4]
    assert CheckpointStore(Storage(str(folder))).newest(pytest.fail) == made(4)
    assert {file: file.read_text() for file in strange} == strange


def test_a_step_of_more_than_eight_digits_counts(store):
    store.save(made(0))
    store.save(Checkpoint(123_456_789, {"state.json": b"{}"}))

    assert store.steps() == [0, 123_456_789]


def test_strange_files_in_a_checkpoint_do_no_harm_and_go_with_it(store, folder):
    store.save(made(1))
    own = folder / "checkpoints/step-00000001"
    (own / "adapter/adapter_model.safetensors.0a1b2c3d.part").write_bytes(
        b"half"
    )  # of a process that was killed
    (own / "manifest.json.4e5f6071.part").write_bytes(b"{")
    (own / "notes").mkdir()
    (own / "notes/mine.txt").write_text("mine")

    assert store.newest(on_damage=pytest.fail) == made(1)
    store.save(made(2))
    store.save(made(3))

    assert not own.exists()
    assert store.steps() == [2, 3]


def test_a_checkpoint_is_invisible_while_it_is_written(store, folder):
    store.save(made(1))
    seen = []

    class Watched(Storage):
        def write(self, name, content):
            seen.append(CheckpointStore(Storage(str(folder))).newest(lambda text: None).step)
            super().write(name, content)

    CheckpointStore(Watched(str(folder))).save(made(2))

    assert seen == [1, 1, 1]
    assert store.newest() == made(2)


def test_a_checkpoint_is_incomplete_while_it_is_written_again(store, folder):
    store.save(made(1))
    store.save(made(2))

    class Dies(Storage):
        def write(self, name, content):
            if name.endswith("optimiser.safetensors"):
                raise StorageError("no more")
            super().write(name, content)

    with pytest.raises(StorageError):
        CheckpointStore(Dies(str(folder))).save(
            Checkpoint(2, {"state.json": b"1", "optimiser.safetensors": b"2"})
        )

    assert store.newest(lambda text: None) == made(1)


# ---- the writer --------------------------------------------------------------------------


class Slow(Storage):
    """Waits before each manifest until the test releases `go_on`."""

    def __init__(self, address):
        super().__init__(address)
        self.go_on = threading.Semaphore(0)

    def write(self, name, content):
        if name.endswith("manifest.json"):
            assert self.go_on.acquire(timeout=30)
        super().write(name, content)


def test_the_writer_stores_each_checkpoint(store):
    writer = CheckpointWriter(store, None)

    for step in range(4):
        writer.put(made(step))
        writer.flush(30)
        assert writer.newest == store.newest() == made(step)

    writer.close()


def test_slow_storage_delays_nothing_and_gets_the_newest_checkpoint(folder):
    slow = Slow(str(folder))
    writer = CheckpointWriter(CheckpointStore(slow), None)

    for step in range(10):
        writer.put(made(step))
    slow.go_on.release(2)
    writer.flush(30)

    steps = CheckpointStore(Storage(str(folder)), keep=99).steps()
    assert steps[-1] == 9
    assert len(steps) <= 2
    assert writer.newest == made(9)
    writer.close()


def test_slow_storage_gets_a_measured_checkpoint_although_newer_ones_are_not_measured(folder):
    slow = Slow(str(folder))
    writer = CheckpointWriter(CheckpointStore(slow), None)

    for step, objective in enumerate([None, None, 5.0, None, None]):
        writer.put(made(step, objective))
    slow.go_on.release(3)
    writer.flush(30)

    store = CheckpointStore(Storage(str(folder)))
    assert store.best() == 2
    assert store.newest() == writer.newest == made(4)
    writer.close()


def test_the_writer_drops_a_checkpoint_older_than_the_newest(store):
    writer = CheckpointWriter(store, made(5))

    writer.put(made(4))

    writer.flush(30)
    assert writer.newest == made(5)
    assert store.steps() == []
    writer.close()


class Full(Storage):
    """A disk that is full while `full` is set."""

    def __init__(self, address):
        super().__init__(address)
        self.full = True

    def write(self, name, content):
        if self.full:
            raise StorageError(f"{self.address} cannot be written to: No space left on device.")
        super().write(name, content)


def test_a_full_disk_is_reported_once_and_so_is_its_end(folder, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "RETRY_S", 0.01)
    full, said = Full(str(folder)), []
    writer = CheckpointWriter(CheckpointStore(full), None, on_event=said.append)
    for step in range(3):
        writer.put(made(step))
    with pytest.raises(StorageError) as caught:
        writer.flush(0.2)

    full.full = False
    writer.flush(30)

    assert "The checkpoint of step 2 could not be kept within 0.2 s." in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert CheckpointStore(Storage(str(folder))).newest() == made(2)
    writer.close()
    assert len(said) == 2
    assert "is not written yet" in said[0]
    assert said[1] == "Checkpoints are written again, from step 2 on."


class BackendError(Exception):
    """An error that only its library knows."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (BackendError("quota used up.\nrequest 17"), "BackendError: quota used up."),
        (BackendError(), "BackendError: BackendError."),
        (KeyError("size"), "KeyError: 'size'."),
        (RecursionError("too deep"), "RecursionError: too deep."),
        (MemoryError("no room"), "MemoryError: no room."),
        (StorageError("It is read-only."), "It is read-only."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_error_of_the_store_ends_the_writer(store, monkeypatch, error, sentence):
    monkeypatch.setattr(CheckpointWriter, "RETRY_S", 0.01)
    errors, said = [error, error], []

    class Failing(CheckpointStore):
        def save(self, checkpoint):
            if errors:
                raise errors.pop()
            super().save(checkpoint)

    writer = CheckpointWriter(Failing(store.storage), None, on_event=said.append)
    writer.put(made(1))
    writer.flush(30)
    writer.put(made(2))
    writer.flush(30)

    assert store.steps() == [1, 2]
    assert said == [
        f"The checkpoint of step 1 is not written yet. {sentence}",
        "Checkpoints are written again, from step 1 on.",
    ]
    writer.close()


@pytest.fixture
def clock(monkeypatch):
    """The clock of the writer: `clock.now`, in seconds, stands still."""
    clock = SimpleNamespace(now=1000.0, perf_counter=lambda: 0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(checkpoint_store, "time", clock)
    return clock


def test_checkpoints_that_wait_for_long_give_a_warning_and_then_an_error(
    folder, monkeypatch, clock
):
    monkeypatch.setattr(CheckpointWriter, "RETRY_S", 0.01)
    full, failed = Full(str(folder)), threading.Event()
    writer = CheckpointWriter(CheckpointStore(full), None, on_event=lambda text: failed.set())
    assert writer.check_unwritten(60, 600) is None

    for step in (3, 4, 5):  # each replaces the one before
        writer.put(made(step))
        clock.now += 30
    assert failed.wait(30)

    # 90 s since step 3.
    assert writer.check_unwritten(90, None) is None
    warning = writer.check_unwritten(89, 90)
    assert warning == (
        f"The checkpoints from step 3 on are not kept yet, after 90 s. {folder} cannot be written to: "
        "No space left on device."
    )
    with pytest.raises(StorageError) as caught:
        writer.check_unwritten(60, 89)
    assert str(caught.value) == (
        "For 90 s, longer than train.max_unsaved_s=89, the checkpoints from step 3 on could not be kept. "
        f"{folder} cannot be written to: No space left on device. Resume the run once the storage works."
    )

    full.full = False
    writer.flush(30)
    clock.now += 1000
    assert writer.check_unwritten(60, 600) is None
    writer.close()


def test_storage_that_is_slower_than_the_steps_waits_since_the_first_newer_checkpoint(
    folder, clock
):
    slow = Slow(str(folder))
    writer = CheckpointWriter(CheckpointStore(slow), None)
    writer.put(made(1, 5.0))
    for step in (2, 3):
        clock.now += 10
        writer.put(made(step))

    assert "from step 1 on are not kept yet, after 20 s" in writer.check_unwritten(1, None)
    slow.go_on.release()
    with writer._changed:
        assert writer._changed.wait_for(lambda: len(writer._waiting) == 1, 30)
    warning = writer.check_unwritten(1, None)
    slow.go_on.release()
    writer.flush(30)

    assert warning == (
        f"The checkpoints from step 2 on are not kept yet, after 10 s. {folder} did not answer."
    )
    assert writer.check_unwritten(1, 1) is None
    writer.close()


def test_storage_that_never_answers_is_named_after_the_timeout(folder):
    slow = Slow(str(folder))
    writer = CheckpointWriter(CheckpointStore(slow), None)
    writer.put(made(1))

    with pytest.raises(
        StorageError, match=r"step 1 could not be kept within 0.1 s. .* did not answer"
    ):
        writer.flush(0.1)

    slow.go_on.release()
    writer.flush(30)
    writer.close()


# ---- storage ---------------------------------------------------------------------------------


def test_a_file_system_of_fsspec_works():
    storage = Storage("memory://bucket/run")
    store = CheckpointStore(storage, keep=1)

    for step in range(3):
        store.save(made(step))

    assert store.steps() == [2]
    assert CheckpointStore(Storage("memory://bucket/run")).newest() == made(2)
    storage.delete("checkpoints")
    assert store.newest() is None


def test_a_file_is_replaced_atomically_and_a_missing_one_is_none(folder):
    storage = Storage(str(folder))
    storage.write("a/b.json", b"first")

    storage.write("a/b.json", b"second")

    assert storage.read("a/b.json") == b"second"
    assert storage.names("a") == ["b.json"]
    assert storage.read("a/c.json") is None
    assert storage.names("nowhere") == []
    storage.delete("a/c.json")


@pytest.mark.parametrize(
    "address", ["nowhere://x", "s3://", "memory2://a/b"], ids=["unknown", "no bucket", "no such"]
)
def test_an_address_that_cannot_be_opened_becomes_one_sentence(address):
    with pytest.raises(StorageError) as caught:
        Storage(address).write("a", b"")

    assert str(caught.value).startswith(f"{address} cannot be written to: ")
    assert "\n" not in str(caught.value)


@pytest.fixture
def broken():
    """The class of a file system of fsspec whose every request raises its `error`."""

    class Broken(MemoryFileSystem):
        protocol = "broken"
        cachable = False
        error: BaseException

        def fails(self, *args, **kwargs):
            raise self.error

        info = ls = open = _open = mkdir = makedirs = rm = fails

    fsspec.register_implementation("broken", Broken, clobber=True)
    return Broken


REQUESTS = [
    ("written to", lambda storage: storage.write("a/b", b"1")),
    ("read", lambda storage: storage.read("a/b")),
    ("listed", lambda storage: storage.names("a")),
    ("listed", lambda storage: storage.folders("a")),
    ("written to", lambda storage: storage.delete("a/b")),
]


@pytest.mark.parametrize(("verb", "request_"), REQUESTS)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BackendError("quota used up.\nrequest 17"), "quota used up"),
        (BackendError(" \n"), "BackendError"),
        (KeyError("size"), "'size'"),
        (RecursionError(), "RecursionError"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_of_a_file_system_becomes_one_sentence(broken, verb, request_, error, reason):
    broken.error = error

    with pytest.raises(StorageError) as caught:
        request_(Storage("broken://bucket/run"))

    assert str(caught.value) == f"broken://bucket/run cannot be {verb}: {reason}."


def test_an_error_of_a_file_system_is_found_before_the_start(broken):
    broken.error = BackendError("no such account")

    with pytest.raises(ConfigError) as caught:
        check_storage("broken://bucket/run")

    assert str(caught.value) == (
        "train.storage is 'broken://bucket/run', and no checkpoint can be kept there: "
        "no such account."
    )


def test_a_lack_of_memory_is_not_a_fault_of_the_storage(broken):
    broken.error = MemoryError("no room")

    with pytest.raises(MemoryError):
        Storage("broken://bucket/run").read("a")


@contextmanager
def at_most(size):
    """Let this process write at most `size` bytes to a file, as if the disk were then full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    storage = Storage(str(tmp_path))
    write_atomic(tmp_path / "text", "old")
    storage.write("folder/bytes", b"old")

    with pytest.raises(OSError, match="File too large"), at_most(1000):
        write_atomic(tmp_path / "text", "new" * 1000)
    with pytest.raises(StorageError, match="File too large"), at_most(1000):
        storage.write("folder/bytes", b"new" * 1000)

    files = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"text": "old", "bytes": "old"}


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    file, replace, parts = tmp_path / "file", os.replace, []

    def while_another_process_writes(part, target):
        parts.append(part.name)
        if len(parts) == 1:
            write_atomic(file, "of the other process")
            assert file.read_text() == "of the other process"
        replace(part, target)

    monkeypatch.setattr(os, "replace", while_another_process_writes)
    write_atomic(file, "of this process")

    assert file.read_text() == "of this process"
    assert list(tmp_path.iterdir()) == [file]
    assert len(set(parts)) == 2
    assert {name.rpartition(".")[2] for name in parts} == {"part"}


# ---- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "joined"),
    [
        ("/data/runs", "/data/runs/first"),
        ("/data/runs//", "/data/runs/first"),
        ("/", "/first"),
        ("runs", "runs/first"),
        ("/data/what?#now", "/data/what?#now/first"),  # a folder of this name
        ("s3://bucket", "s3://bucket/first"),
        ("s3://bucket/runs/", "s3://bucket/runs/first"),
        ("s3://bucket?region=eu-west-1", "s3://bucket/first?region=eu-west-1"),
        (
            "s3://bucket/runs/?endpoint_override=127.0.0.1:9000&scheme=http",
            "s3://bucket/runs/first?endpoint_override=127.0.0.1:9000&scheme=http",
        ),
        ("s3://bucket/runs?a=http://b/?c#d?e", "s3://bucket/runs/first?a=http://b/?c#d?e"),
        ("s3://bucket/runs#part?x", "s3://bucket/runs/first#part?x"),
        ("file:///", "file:///first"),
        ("memory://", "memory:///first"),
        ("simplecache::s3://bucket/runs", "simplecache::s3://bucket/runs/first"),
    ],
)
def test_a_name_goes_into_the_path_of_an_address(address, joined):
    assert join_address(address, "first") == joined


@pytest.mark.parametrize(
    ("address", "kind", "path"),
    [
        ("/data/a?b", fs.LocalFileSystem, "/data/a?b/first"),
        ("file:///data/runs?a=b#c", fs.LocalFileSystem, "/data/runs/first"),
        ("file:///data/runs#c", fs.LocalFileSystem, "/data/runs/first"),
        (
            "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http",
            fs.S3FileSystem,
            "bucket/runs/first",
        ),
        ("memory://bucket/runs", fs.PyFileSystem, "/bucket/runs/first"),
        ("memory://", fs.PyFileSystem, "/first"),
    ],
)
def test_the_joined_address_opens_below_the_first(address, kind, path):
    system, found = open_address(join_address(address, "first"))

    assert isinstance(system, kind)
    assert found == path


@pytest.mark.parametrize("name", ["moto", "ministack"])
def test_runs_at_an_address_with_a_query_have_folders_of_their_own(monkeypatch, name):
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with emulator(name) as endpoint:
        s3 = boto3.client("s3", region_name="us-east-1", endpoint_url=endpoint)
        s3.create_bucket(Bucket="bucket")
        host = endpoint.removeprefix("http://")
        address = f"s3://bucket/runs?region=us-east-1&endpoint_override={host}&scheme=http"
        check_storage(address)
        runs = [CheckpointStore(Storage(join_address(address, run))) for run in ("a", "b")]

        for step in range(4):
            runs[0].save(made(step))
        runs[1].save(made(7))

        assert runs[0].newest(on_damage=pytest.fail) == made(3)
        assert [run.steps() for run in runs] == [[2, 3], [7]]
        keys = {each["Key"] for each in s3.list_objects_v2(Bucket="bucket")["Contents"]}
        assert {key for key in keys if key.endswith(".json") and "manifest" in key} == {
            "runs/a/checkpoints/step-00000002/manifest.json",
            "runs/a/checkpoints/step-00000003/manifest.json",
            "runs/b/checkpoints/step-00000007/manifest.json",
        }
        assert {key.split("/")[0] for key in keys} == {"runs"}


def test_a_file_in_place_of_the_folder_becomes_one_sentence(tmp_path):
    (tmp_path / "run").write_text("in the way")

    with pytest.raises(StorageError, match=r"run cannot be written to: "):
        Storage(str(tmp_path / "run")).write("a/b", json.dumps({}).encode())


def test_checkpoints_that_cannot_be_read_for_a_moment_are_not_passed_over(
    store, folder, monkeypatch
):
    for step in (1, 2):
        store.save(made(step))
    later, read = CheckpointStore(Storage(str(folder))), Storage.read_start

    def fails(storage, name, max_bytes):
        if name.startswith("checkpoints/step-00000002"):
            raise StorageError("The service is busy.")
        return read(storage, name, max_bytes)

    monkeypatch.setattr(Storage, "read_start", fails)
    with pytest.raises(StorageError, match="busy"):
        later.newest(on_damage=lambda text: pytest.fail(text))

    monkeypatch.undo()
    assert later.newest() == made(2)
