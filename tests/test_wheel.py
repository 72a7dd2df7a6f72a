"""The wheel: built here, installed into an empty environment, used there."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = """
import torch, dyndepth, dyndepth.kernels
from dyndepth.op import REGISTRY
from dyndepth.ops import compact_rows
assert dyndepth.__file__.startswith({site!r}), dyndepth.__file__
state = torch.tensor([1, 0], dtype=torch.int8)
assert REGISTRY["compact_rows"].choose(state, []).name == "cpp"
print(compact_rows(state, [torch.tensor([10, 20])])[0][0].tolist())
"""


@pytest.mark.wheel
def test_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    stale = ROOT / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "dyndepth" / "stale.py"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text("")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=600)
    wheel = next(tmp_path.glob("dyndepth-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "dyndepth/py.typed" in names
    assert "dyndepth/kernels/__init__.py" in names
    assert any(name.startswith("dyndepth/_C.") for name in names)
    # Exactly the sources: nothing left out, and nothing of what was renamed or removed since an earlier build.
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "dyndepth").rglob("*.py")} | {"dyndepth/py.typed"}
    sources |= {str(p.relative_to(ROOT)) for p in (ROOT / "dyndepth" / "demo" / "exits").iterdir()}
    sources |= {f"dyndepth/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    sources |= {f"dyndepth/kernels/launch_tables/{p.name}" for p in (ROOT / "kernels" / "launch_tables").glob("*.json")}
    sources |= {
        str(p.relative_to(ROOT))
        for folder in ("text_exits", "speech_weights")
        for p in (ROOT / "dyndepth/demo/tasks" / folder).iterdir()
    } | {"dyndepth/demo/tasks/words.txt"}
    sources |= {f"dyndepth/_cuda_sources/{p.name}" for p in (ROOT / "csrc" / "cuda").glob("*.*")}
    assert {name for name in names if ".dist-info/" not in name and not name.startswith("dyndepth/_C.")} == sources

    folder = tmp_path / "empty"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, timeout=600)
    # Its dependencies are this environment's: installing torch again would only test pip. The package itself is not.
    (site / "dependencies.pth").write_text(_dependencies())
    done = subprocess.run(
        [str(python), "-c", CODE.format(site=str(site))], check=True, timeout=120, capture_output=True, text=True, cwd="/"
    )
    assert done.stdout.strip() == "[20, 10]"
    command = folder / "bin" / "dyndepth"
    assert (
        "compact_rows" in subprocess.run([str(command), "info"], check=True, timeout=120, capture_output=True, text=True).stdout
    )


def _dependencies() -> str:
    import torch

    return str(Path(torch.__file__).parent.parent) + "\n"
