"""Files appear whole or not at all: one of them (:func:`write_atomic`), or the folder of a run (:func:`staged`)."""

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from untrojan.errors import ConfigError

RECORD, REPORT, SARIF = "record.json", "report.html", "findings.sarif"


def sha256(data: bytes) -> str:
    """Hash as lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either what it held before or all of it, also after a crash.

    A link stays, and what it leads to is written.

    Raises:
        ConfigError: There is something that is no regular file.
        OSError: It cannot be written there.
    """
    path = Path(os.path.realpath(path))
    require_file(path)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require_file(path: Path) -> None:
    """Raise when :func:`write_atomic` would refuse `path`, so that nobody waits for a run to hear it."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise ConfigError(f"{path} is {kind}; give the file to write")


def require_free(folder: Path, force: bool) -> None:
    """Raise when :func:`staged` would refuse `folder`, so that nobody waits for a run to hear it."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder to write into")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give another folder, or --force to replace the run in it")


@contextlib.contextmanager
def staged(folder: str | Path, force: bool) -> Iterator[Path]:
    """Give a hidden folder to write a run into; when the block ends it is moved to its place, and else it is gone.

    It is moved whole, or file by file with the record last where the place exists.

    Args:
        folder: Where the run shall be in the end; what it lies in is made if it is not there.
        force: Whether that may hold something already.

    Yields:
        A new folder: beside the destination, or inside of it where that exists.

    Raises:
        ConfigError: The destination is not empty and `force` is not set.
    """
    folder = Path(folder).resolve()
    require_free(folder, force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder if folder.is_dir() else folder.parent
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=beside) as partial:
        made = Path(partial) / "run"
        made.mkdir()
        yield made
        _move(made, folder)


def _move(made: Path, folder: Path) -> None:
    if not folder.exists():
        made.rename(folder)
        return
    for file in sorted(made.iterdir(), key=lambda file: file.name == RECORD):
        file.replace(folder / file.name)
