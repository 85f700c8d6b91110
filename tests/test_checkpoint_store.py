"""Checkpoints in storage: whole or passed over, the newest and the best kept, never in the way."""

import json
import threading

import pytest

from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, CheckpointWriter
from ray_detox.runs.storage import Storage, StorageError


def made(step, objective=None):
    """A checkpoint of two files."""
    files = {"state.json": b'{"step": %d}' % step, "adapter/weights": bytes([step]) * 5000}
    return Checkpoint(step, files, objective)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(folder):
    return CheckpointStore(Storage(str(folder)), keep=2)


def test_a_checkpoint_comes_back_as_it_was(store, folder):
    store.save(made(3, objective=1.5))

    again = CheckpointStore(Storage(str(folder)))
    assert again.newest() == made(3, objective=1.5)
    assert again.load(3) == made(3, objective=1.5)


def test_there_is_none_before_the_first(store, folder):
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
    ],
)
def test_the_newest_and_the_best_are_kept(store, folder, objectives, left):
    for step, objective in enumerate(objectives):
        store.save(made(step, objective))

    assert store.steps() == left
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {f"step-{step:08d}" for step in left}


def test_the_best_of_an_earlier_process_is_known(store, folder):
    for step, objective in enumerate([None, 5.0, 1.0]):
        store.save(made(step, objective))
    later = CheckpointStore(Storage(str(folder)), keep=1)

    later.save(made(3, 0.0))

    assert later.best() == 1
    assert later.steps() == [1, 3]


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
        ("adapter/weights", cut_short, "is 100 bytes, and not the 5,000 bytes"),
        ("adapter/weights", flip_a_bit, "is damaged: adapter/weights is 5,000 bytes"),
        ("adapter/weights", lambda file: file.unlink(), "adapter/weights is missing"),
        ("manifest.json", cut_short, "was cut off while it was written"),
        ("manifest.json", lambda file: file.unlink(), "was cut off while it was written"),
        ("manifest.json", lambda file: file.write_text("[]"), "was cut off while it was written"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(store, folder, name, damage, sentence):
    store.save(made(1))
    store.save(made(2))
    damage(folder / "checkpoints/step-00000002" / name)
    said = []

    found = store.newest(on_damage=said.append)

    assert found == made(1)
    assert len(said) == 1
    assert "The checkpoint of step 2" in said[0]
    assert sentence in said[0]
    assert said[0].endswith("It is passed over.")


def test_a_checkpoint_that_is_being_written_is_not_there_yet(store, folder):
    store.save(made(1))
    seen = []

    class Watched(Storage):
        def write(self, name, content):
            seen.append(CheckpointStore(Storage(str(folder))).newest(lambda text: None).step)
            super().write(name, content)

    CheckpointStore(Watched(str(folder))).save(made(2))

    assert seen == [1, 1, 1]
    assert store.newest() == made(2)


def test_a_step_that_is_written_again_is_not_whole_meanwhile(store, folder):
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


# ---- beside training -------------------------------------------------------------------------


class Slow(Storage):
    """Waits before each manifest until it is told to go on."""

    def __init__(self, address):
        super().__init__(address)
        self.go_on = threading.Semaphore(0)

    def write(self, name, content):
        if name.endswith("manifest.json"):
            assert self.go_on.acquire(timeout=30)
        super().write(name, content)


def test_a_writer_keeps_what_it_was_given(store):
    writer = CheckpointWriter(store, None)

    for step in range(4):
        writer.put(made(step))
        writer.flush(30)
        assert writer.newest == store.newest() == made(step)

    writer.close()


def test_slow_storage_holds_nothing_up_and_gets_the_newest(folder):
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


def test_a_checkpoint_older_than_the_newest_is_of_no_use(store):
    writer = CheckpointWriter(store, made(5))

    writer.put(made(4))

    writer.flush(30)
    assert writer.newest == made(5)
    assert store.steps() == []
    writer.close()


class Full(Storage):
    """Has no room left, until it has."""

    def __init__(self, address):
        super().__init__(address)
        self.full = True

    def write(self, name, content):
        if self.full:
            raise StorageError(f"{self.address} cannot be written to: No space left on device.")
        super().write(name, content)


def test_a_full_disk_is_said_once_and_so_is_its_end_and_the_newest_is_kept_then(
    folder, monkeypatch
):
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
    assert "is not kept yet" in said[0]
    assert said[1] == "Checkpoints are kept again, from step 2 on."


def test_storage_that_never_answers_is_a_sentence_in_the_end(folder):
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


# ---- places ----------------------------------------------------------------------------------


def test_any_file_system_of_fsspec_will_do():
    storage = Storage("memory://bucket/run")
    store = CheckpointStore(storage, keep=1)

    for step in range(3):
        store.save(made(step))

    assert store.steps() == [2]
    assert CheckpointStore(Storage("memory://bucket/run")).newest() == made(2)
    storage.delete("checkpoints")
    assert store.newest() is None


def test_a_file_is_there_whole_or_not_at_all(folder):
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
def test_an_address_that_cannot_be_opened_is_one_sentence(address):
    with pytest.raises(StorageError) as caught:
        Storage(address).write("a", b"")

    assert str(caught.value).startswith(f"{address} cannot be written to: ")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("in the way")

    with pytest.raises(StorageError, match=r"run cannot be written to: "):
        Storage(str(tmp_path / "run")).write("a/b", json.dumps({}).encode())
