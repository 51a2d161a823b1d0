"""Builds the package `mustafar` with its native extension `mustafar._C`.

CUDA kernels are compiled where torch has CUDA and nvcc is found, the CPU kernels everywhere. Environment:

MUSTAFAR_CUDA=0        leave the CUDA kernels out
MUSTAFAR_EXT=0         leave the whole extension out (build/Makefile, which builds it in place, incrementally)
TORCH_CUDA_ARCH_LIST   GPU architectures, e.g. "8.0;9.0" (default: the GPUs present, else 8.0 to 9.0 and PTX)
MAX_JOBS               compiler processes at a time
"""

from __future__ import annotations

import os
import shlex
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

try:
    import torch
except ModuleNotFoundError:
    # `pip install -e .` builds in an isolated environment without torch; the extension must be built against the
    # installed one anyway, so look where that lives.
    site.addsitedir(sysconfig.get_path("purelib"))
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit("mustafar is built against the installed torch: pip install torch==2.13.0 first")
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
KERNEL = Path("..") / "kernel"
ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"


def sources(folder: Path, *patterns: str) -> list[str]:
    """Files of `folder` (relative to this one) that match, in a stable order."""
    return sorted(str(folder / path.name) for p in patterns for path in (HERE / folder).glob(p))


def with_cuda() -> bool:
    if os.environ.get("MUSTAFAR_CUDA") == "0" or torch.version.cuda is None:
        return False
    if cpp_extension.CUDA_HOME is None:
        print(
            f"mustafar: torch has CUDA {torch.version.cuda} but no nvcc was found (CUDA_HOME is not set): "
            "building the CPU kernels only",
            file=sys.stderr,
        )
        return False
    return True


def runtime_flags() -> list[str]:
    """Link flags that make the extension share torch's libstdc++.

    Some compilers have the static library only. An extension with a libstdc++ of its own breaks where it raises an
    error: messages come out truncated, or Python crashes.
    """
    compiler = os.environ.get("CXX", "c++")  # may be several words: CXX="ccache g++"
    asked = [*shlex.split(compiler), "-print-file-name=libstdc++.so"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return []  # no compiler, or one that knows no such option: the build itself will tell
    if sys.platform != "linux" or os.path.isabs(found):
        return []
    flags = ["-l:libstdc++.so.6"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <sstream>\nint main() { std::ostringstream() << 1; }\n")
        probe = [*shlex.split(compiler), str(source), "-o", str(source.with_suffix("")), *flags]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return flags
    print(
        f"mustafar: WARNING: {compiler} has no shared libstdc++, so errors raised by the ops would crash Python: "
        "build with another compiler, e.g. CXX=/usr/bin/g++ CC=/usr/bin/gcc",
        file=sys.stderr,
    )
    return []


def extension() -> cpp_extension.CppExtension:
    link = runtime_flags()
    # at::parallel_for in our sources is a plain loop unless they are compiled with OpenMP.
    cxx = ["-O3", "-std=c++20", "-fopenmp"]
    common = sources(Path("csrc"), "bindings.cpp", "ops_cpu.cpp") + sources(KERNEL / "cpu", "*.cpp")
    headers = [
        str(path) for folder in ("csrc", "../kernel", "../kernel/cpu", "../kernel/csrc")
        for path in sorted((HERE / folder).glob("*.[hc]*")) if path.suffix in (".h", ".cuh")
    ]  # fmt: skip
    if not with_cuda():
        files = common + sources(Path("csrc"), "ops_nocuda.cpp")
        return cpp_extension.CppExtension(
            "mustafar._C", files, depends=headers, extra_compile_args={"cxx": cxx}
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    files = common + sources(Path("csrc"), "ops_cuda*.cpp") + sources(KERNEL / "csrc", "*.cu")
    nvcc = ["-O3", "-std=c++17", "-lineinfo"]
    return cpp_extension.CUDAExtension(
        "mustafar._C",
        files,
        depends=headers,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
    )


setup(
    packages=["mustafar", "mustafar.pruning", "mustafar.kernel"],
    package_dir={"mustafar": "mustafar", "mustafar.kernel": "../kernel"},
    ext_modules=[] if os.environ.get("MUSTAFAR_EXT") == "0" else [extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
