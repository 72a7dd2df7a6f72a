"""Whole files or none: what `replacing` leaves after success, failure and a kill, whoever does the writing."""

from __future__ import annotations

import os
import platform
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dyndepth.files import replacing, sweep

# Writes as safetensors does: to a name of its own choice beside the one it was given, which a kill then leaves.
_KILLED = """
import os, signal, sys
from pathlib import Path
from dyndepth.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    (temporary.parent / ".tmpAbCdEf").write_text("half")
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_success_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    for content in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(content)
            assert temporary.name == path.name, "a library may choose the format by the suffix"
        assert path.read_text() == content
        assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_failure_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("earlier")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        (temporary.parent / "scratch").write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("earlier")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "earlier"


def test_a_kill_leaves_only_what_sweep_removes(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_text("earlier")
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "earlier"
    assert len(list(tmp_path.rglob("*"))) == 4, "the file, the folder of temporaries and two of them"
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_sweep_spares_the_living_and_other_machines(tmp_path: Path) -> None:
    node = platform.node()
    names = {
        "dead": f".a.{node}@4194999.x.tmp",
        "old": f".b.{node}@4194999.x.tmp",
        "alive": f".a.{node}@{os.getpid()}.x.tmp",
        "other": ".a.elsewhere@4194999.x.tmp",
        "foreign": ".tmpAbCdEf",
    }
    for what, name in names.items():
        if what == "old":  # a file, as before the folders
            (tmp_path / name).write_text("half")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "part").write_text("half")
    sweep(tmp_path)
    assert {what for what, name in names.items() if (tmp_path / name).exists()} == {"alive", "other", "foreign"}
