import errno
import os

import pytest

from untrojan.writing import sha256, staged, write_atomic


def test_write_atomic(tmp_path):
    path = tmp_path / "file"
    for data in (b"one", b"", b"three"):
        write_atomic(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_write_atomic_that_fails_leaves_what_was_there(tmp_path, monkeypatch, there, moment, error):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "fsync", fail) if moment == "fsync" else monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == ([("file", b"old")] if there else [])


def test_write_atomic_onto_a_folder(tmp_path):
    with pytest.raises(OSError, match="file"):
        write_atomic(tmp_path.joinpath("file", "deeper"), b"new")
    tmp_path.joinpath("file").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "file", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """Another writes the same file while the first waits for the disk."""
    path, fsync = tmp_path / "file", os.fsync

    def other_writes(number):
        monkeypatch.setattr(os, "fsync", fsync)
        fsync(number)
        write_atomic(path, b"other")
        assert path.read_bytes() == b"other"

    monkeypatch.setattr(os, "fsync", other_writes)
    write_atomic(path, b"first")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"first")]


@pytest.mark.parametrize("where", ["link/new", "there/inner/..", "dangling"])
def test_a_run_goes_where_links_and_dots_lead(tmp_path, where):
    (tmp_path / "there" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "not-there")
    with staged(tmp_path / where, force=True) as made:
        (made / "record.json").write_bytes(b"{}")
    assert (tmp_path / where / "record.json").read_bytes() == b"{}"
    assert not list(tmp_path.rglob("*.partial"))


def test_sha256():
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
