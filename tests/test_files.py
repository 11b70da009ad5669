"""Locks that go with their process, full disks, JSON that says what is wrong with it."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time

import pytest

from captioning import InputError, files


def hold(path, held):
    """Hold a lock, and have a forked worker that outlives this process."""
    with files.lock(path, wait=False) as ours:
        assert ours
        worker = os.fork()
        if worker == 0:
            threading.Event().wait(60)
            os._exit(0)
        held.send(worker)
        threading.Event().wait(60)


def test_a_lock_goes_with_its_process_and_not_with_its_workers(tmp_path):
    path = tmp_path / "new" / ".lock"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(path, theirs))
    holder.start()
    assert ours.poll(60)
    worker = ours.recv()
    with files.lock(path, wait=False) as alone:
        assert not alone
    holder.kill()
    holder.join()
    os.kill(worker, 0)  # it lives
    for _ in range(600):  # on a busy machine it may not have left its parent's files yet
        with files.lock(path, wait=False) as alone, files.lock(path, wait=False) as second:
            assert not second or not alone, "in the same process too"
        if alone:
            break
        time.sleep(0.1)
    assert alone
    os.kill(worker, 9)
    assert list(path.parent.iterdir()) == []


def test_a_lock_is_waited_for_and_held_by_one_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(5):
            with files.lock(tmp_path / "lock", wait=True) as held:
                inside.append(held)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 15
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_refuses_nobody(code, tmp_path, monkeypatch, recwarn):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.lock(tmp_path / "lock", wait=False) as first, files.lock(tmp_path / "lock", wait=True) as second:
        assert first and second
    assert not recwarn.list and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error_and_no_lock(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), files.lock(tmp_path / "file" / "lock", wait=False):
        pass


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (Exception("No space left on device (os error 28)"), True),  # as the tokenizers' library says it
        (OSError(errno.EACCES, "Permission denied"), False),
        (Exception("Permission denied (os error 13)"), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_known_by_number_or_by_words(error, full):
    assert files.is_full_disk(error) == full


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', r"is not a JSON file \(Expecting value: line 2 column 7 .*\); correct the file$"),
        (b'{"a": 1,\n\n"b": "caf\xe9"}', r"is not a JSON file in UTF-8 \(line 3: 'utf-8' codec can't decode byte 0xe9"),
        (b"[1]", "holds a list, not a JSON object; correct the file$"),
    ],
)
def test_json_that_is_none_says_what_is_wrong_and_where(content, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        files.read_json(file)
    with pytest.raises(InputError, match=r"; fetch it again$"):
        files.read_json(file, "fetch it again")


def test_json_is_written_as_people_read_it(tmp_path):
    value = {"caption": "Квадрат слева, 左, \U0001f600", "half": "\ud83d", "line": "\u2028\n"}
    files.write_whole(tmp_path / "file.json", files.json_text(value, indent=1))
    assert "Квадрат слева, 左, \U0001f600" in (tmp_path / "file.json").read_text(encoding="utf-8")
    assert files.read_json(tmp_path / "file.json") == value
