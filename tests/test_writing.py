import errno
import os

import pytest

from untrojan.errors import ConfigError
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
    with pytest.raises(ConfigError, match="is a folder"):
        write_atomic(tmp_path / "file", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_file_is_neither_replaced_nor_taken_for_a_folder(tmp_path, link):
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if link:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    with pytest.raises(ConfigError, match="is a pipe or a device; give the file"):
        write_atomic(path, b"new")
    with pytest.raises(ConfigError, match="is a file; give a folder"), staged(path, force=True):
        pytest.fail("a run may begin")
    assert pipe.is_fifo()
    assert path.is_symlink() == link


@pytest.mark.parametrize("there", [False, True])
def test_what_a_link_leads_to_is_written(tmp_path, there):
    (tmp_path / "inner").mkdir()
    file, link = tmp_path / "inner" / "file", tmp_path / "link"
    link.symlink_to(file)
    if there:
        file.write_bytes(b"old")
    write_atomic(link, b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    name = "é" * 127
    write_atomic(tmp_path / name, b"new")
    with staged(tmp_path / name[1:], force=False) as made:
        (made / "record.json").write_bytes(b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name[1:], name]


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
