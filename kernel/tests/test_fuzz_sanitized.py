"""The CPU kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, on generated problems.

MUSTAFAR_FUZZ_SANITIZED says how many problems each instruction set gets (60 by default).
"""

from __future__ import annotations

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = os.environ.get("MUSTAFAR_FUZZ_SANITIZED", "60")
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kernel/cpu and fuzz_cpu.cpp, sanitized."""
    out = tmp_path_factory.mktemp("sanitized")
    probe = out / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    try:
        works = run(*COMPILER, *SANITIZE, probe, "-o", out / "probe")
        if works.returncode == 0:
            works = run(out / "probe")
    except OSError as error:
        pytest.skip(f"no C++ compiler: {error}")
    if works.returncode != 0:
        pytest.skip(f"{COMPILER[0]} cannot build with sanitizers here: {works.stderr.strip()[-200:]}")

    def compile_one(source: Path) -> Path:
        target = out / f"{source.stem}.o"
        done = run(*COMPILER, "-std=c++20", "-O0", "-g1", *SANITIZE, "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr[-2000:]
        return target

    sources = [*sorted((HERE.parent / "cpu").glob("*.cpp")), HERE / "fuzz_cpu.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    done = run(*COMPILER, *SANITIZE, *objects, "-o", out / "fuzz_cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "fuzz_cpu"


def test_no_sanitizer_report(driver: Path) -> None:
    done = run(driver, CASES, env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "plain" in done.stdout
