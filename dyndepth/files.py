"""Writing files so that a kill or a full disk never leaves half of one: a temporary place in the same folder, then rename."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write, in a folder of its own beside `path`; once written it is synced and renamed to `path`.

    The folder is removed either way. It holds whatever temporaries the writing library makes (safetensors and others
    write to names of their own first), so that `sweep` finds all that a kill leaves.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{_owner()}.", suffix=".tmp", dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        mode = 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove temporaries that killed processes of this machine left in `folder`."""
    for left in folder.glob(".*.tmp"):
        host, _, number = left.name.rpartition("@")
        pid = number.partition(".")[0]
        if host.endswith(f".{platform.node()}") and pid.isdigit() and not _alive(int(pid)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:  # what earlier versions left was a file
                left.unlink(missing_ok=True)


def _owner() -> str:
    return f"{platform.node()}@{os.getpid()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def writable(folder: Path) -> None:
    """Make `folder` and raise OSError unless files can be made in it: asked before long work, not found out after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        pass


def require(module: str, message: str) -> None:
    """Raise ModuleNotFoundError with `message` unless the module is installed; does not import it."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(message)


def _umask() -> int:
    # The mask can only be read by setting it; mkstemp files are private, results should have ordinary permissions.
    mask = os.umask(0)
    os.umask(mask)
    return mask
