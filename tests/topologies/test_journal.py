"""The journal: nothing written is lost, a torn tail is cut, damage in the middle is never passed over."""

import errno
import logging
import multiprocessing
import os
import signal

import pytest

from topologies import journal as journal_module
from topologies.journal import Journal, JournalError, JournalLockedError, JournalTail, read_journal


def write(path, *records):
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
    return path.read_bytes()


def test_records_come_back_in_order(tmp_path):
    """What a resumed run reads is what the earlier one wrote."""
    path = tmp_path / "journal.msgpack"
    write(path, {"a": 1}, ["x", 2.5, None])
    write(path, b"bytes", {"deep": {"list": [1, 2]}, 3: "int key"})
    expected = [{"a": 1}, ["x", 2.5, None], b"bytes", {"deep": {"list": [1, 2]}, 3: "int key"}]
    assert read_journal(path) == expected
    with Journal(path) as journal:
        assert journal.records == expected


def test_every_torn_tail_is_cut_and_the_rest_kept(tmp_path, caplog):
    """A kill at any byte of the last write loses that record only, with a warning, and the next append is readable."""
    path = tmp_path / "journal.msgpack"
    write(path, "first", "second")
    two = len(path.read_bytes())
    whole = write(path, {"third": "x" * 20})
    for length in range(two + 1, len(whole)):
        path.write_bytes(whole[:length])
        assert read_journal(path) == ["first", "second"]
        caplog.clear()
        with caplog.at_level(logging.WARNING), Journal(path) as journal:
            assert journal.records == ["first", "second"]
            journal.append("again")
        assert "torn last record" in caplog.text
        assert read_journal(path) == ["first", "second", "again"]


def test_a_tail_of_zeros_is_torn_too(tmp_path):
    """After a power cut a file can have its new length and none of the new bytes."""
    path = tmp_path / "journal.msgpack"
    whole = write(path, "first")
    path.write_bytes(whole + bytes(64))
    with Journal(path) as journal:
        assert journal.records == ["first"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("offset_in_record", [0, 1, 4, 8, 12, 15])
def test_damage_in_the_middle_is_an_error_with_its_offset(tmp_path, offset_in_record):
    """A flipped bit in a length, a checksum or a payload must not pass for a torn tail and drop what follows."""
    path = tmp_path / "journal.msgpack"
    start = len(write(path, "first"))
    content = bytearray(write(path, {"k": "second"}, "third"))
    content[start + offset_in_record] ^= 0x40
    path.write_bytes(content)
    for read in (Journal, read_journal):
        with pytest.raises(JournalError, match=f"damaged at offset {start}, with whole records from offset"):
            read(path)
    assert path.read_bytes() == content


def test_not_a_journal(tmp_path):
    """Another file of that name is not overwritten."""
    path = tmp_path / "journal.msgpack"
    path.write_bytes(b"something else entirely")
    with pytest.raises(JournalError, match="not a journal"):
        Journal(path)
    assert path.read_bytes() == b"something else entirely"


def test_killed_while_being_created(tmp_path):
    """Any prefix of the magic word is an empty journal."""
    path = tmp_path / "journal.msgpack"
    magic = write(path)
    for length in range(len(magic)):
        path.write_bytes(magic[:length])
        assert read_journal(path) == []
        assert write(path) == magic


def test_one_writer(tmp_path):
    """A second writer is refused with the first one's process id; after close the lock is free, also after an error."""
    path = tmp_path / "journal.msgpack"
    with Journal(path), pytest.raises(JournalLockedError, match=f"in use by process {os.getpid()}"):
        Journal(path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(JournalError):
        Journal(path)
    path.unlink()
    with Journal(path) as journal:
        journal.append(1)
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.append(2)


def _append_forever(path):
    with Journal(path) as journal:
        for i in range(10**9):
            journal.append({"i": i, "pad": "x" * 3000})


def test_a_killed_writer_leaves_a_readable_journal(tmp_path):
    """SIGKILL in the middle of writing: a prefix of the records stands, the lock is gone with the process."""
    path = tmp_path / "journal.msgpack"
    process = multiprocessing.get_context("fork").Process(target=_append_forever, args=(path,))
    process.start()
    assert process.pid is not None
    while not path.exists() or path.stat().st_size < 200_000:
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Journal(path) as journal:
        numbers = [record["i"] for record in journal.records]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > 50


def test_once_runs_once_across_restarts(tmp_path):
    """The memo that resuming rests on: the same value the first time and ever after, and nothing if the work fails."""
    path, calls = tmp_path / "journal.msgpack", []

    def work():
        calls.append(1)
        return {"loss": 1.5, "steps": (1, 2)}

    with Journal(path) as journal:
        with pytest.raises(ZeroDivisionError):
            journal.once("train", lambda: 1 / 0)
        assert not journal.done("train")
        first = journal.once("train", work)
        assert first == journal.once("train", work) == {"loss": 1.5, "steps": [1, 2]}
    with Journal(path) as journal:
        assert journal.done("train")
        assert journal.once("train", work) == first
        assert journal.once("nothing", lambda: None) is None
        assert journal.done("nothing")
    assert len(calls) == 1


def test_once_may_be_nested(tmp_path):
    """A stage journals its parts before itself."""
    with Journal(tmp_path / "j") as journal:
        assert journal.once("outer", lambda: journal.once("inner", lambda: 1) + 1) == 2
        assert [record["key"] for record in journal.records] == ["inner", "outer"]


def test_what_msgpack_cannot_hold_is_named(tmp_path):
    """The error says which result it was; the journal is unharmed."""
    path = tmp_path / "journal.msgpack"
    with Journal(path) as journal:
        with pytest.raises(TypeError, match="the result of 'eval' cannot be journalled"):
            journal.once("eval", object)
        with pytest.raises(TypeError):
            journal.append({"big": 2**70})
        journal.append("after")
    assert read_journal(path) == ["after"]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    """Half a record is taken back, so that the next one does not follow it."""
    path = tmp_path / "journal.msgpack"
    with Journal(path) as journal:
        journal.append("first")

        def half(file, data, offset):
            os.pwrite(file, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(journal_module, "write_at", half)
            before = path.read_bytes()
            with pytest.raises(OSError, match="No space"):
                journal.append("second")
            assert path.read_bytes() == before
        journal.append("third")
        assert journal.records == ["first", "third"]
    assert read_journal(path) == ["first", "third"]


def test_a_record_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    """fsync for every record, after its bytes."""
    path, synced = tmp_path / "journal.msgpack", []
    with Journal(path) as journal:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
        sizes = []
        for record in ("a", "b"):
            journal.append(record)
            sizes.append(path.stat().st_size)
    assert synced == sizes


def test_a_tail_gives_each_record_once_and_waits_for_whole_ones(tmp_path):
    """Guards whoever watches: nothing twice, nothing half, and damage is an error as in a reader of the whole."""
    path = tmp_path / "journal"
    tail = JournalTail(path)
    assert tail.new() == []
    with Journal(path) as journal:
        journal.append({"n": 1})
        assert tail.new() == [{"n": 1}]
        journal.append({"n": 2})
        journal.append({"n": 3})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert tail.new() == [{"n": 2}]
    path.write_bytes(whole)
    assert tail.new() == [{"n": 3}]
    assert tail.new() == []
    damaged = bytearray(whole)
    damaged[12] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(JournalError, match="damaged at offset 8"):
        JournalTail(path).new()
