"""Checkpoints in storage: complete or ignored; the newest and the best kept; never delay training."""

import json
import math
import threading

import pytest

from ray_detox.records import Objective
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, CheckpointWriter
from ray_detox.runs.storage import Storage, StorageError


def made(step, objective=None, key=""):
    """A checkpoint of two files."""
    files = {"state.json": b'{"step": %d}' % step, "adapter/weights": bytes([step]) * 5000}
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
        ("adapter/weights", cut_short, "is 100 bytes, not the 5,000 bytes"),
        ("adapter/weights", flip_a_bit, "is damaged: adapter/weights is 5,000 bytes"),
        ("adapter/weights", lambda file: file.unlink(), "adapter/weights is missing"),
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
            if name.endswith("weights"):
                raise StorageError("no more")
            super().write(name, content)

    with pytest.raises(StorageError):
        CheckpointStore(Dies(str(folder))).save(
            Checkpoint(2, {"state.json": b"1", "weights": b"2"})
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


def test_a_file_in_place_of_the_folder_becomes_one_sentence(tmp_path):
    (tmp_path / "run").write_text("in the way")

    with pytest.raises(StorageError, match=r"run cannot be written to: "):
        Storage(str(tmp_path / "run")).write("a/b", json.dumps({}).encode())
