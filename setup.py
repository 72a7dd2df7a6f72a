"""Builds dyndepth._C with ninja; everything that is only data lives in pyproject.toml."""

import shutil
from pathlib import Path

import pybind11
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension

# One build serves every torch from 2.10 on: the sources use LibTorch's stable ABI only, pinned to that version.
STABLE_ABI_TARGET = "0x020a000000000000"

extension = CppExtension(
    name="dyndepth._C",
    sources=sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
    include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
    extra_compile_args=[
        "-O3",
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        # Vector types pass between inlined functions only, so the ABI note about their registers is noise.
        "-Wno-psabi",
        # Headers of torch are not ours to mend.
        "-Wno-unused-parameter",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
    ],
    # torch strips -g otherwise kept by some distributions' CFLAGS; symbols of templates alone would be megabytes.
    extra_link_args=["-Wl,-s"],
)


class FreshBuildPy(build_py):
    """setuptools copies into build/lib and packs all of it: files that were renamed or removed since would come along."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    packages=[*find_packages(include=["dyndepth", "dyndepth.*"]), "dyndepth.kernels", "dyndepth._cuda_sources"],
    # `kernels/` is installed as dyndepth.kernels: a top-level `kernels` belongs to another project on PyPI.
    package_dir={"dyndepth": "dyndepth", "dyndepth.kernels": "kernels", "dyndepth._cuda_sources": "csrc/cuda"},
    ext_modules=[extension],
    cmdclass={"build_py": FreshBuildPy, "build_ext": BuildExtension.with_options(use_ninja=True)},
)
