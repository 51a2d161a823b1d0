"""Where and with what a row was measured."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit checked out, `-dirty` where tracked files other than results differ, `unknown` without git."""
    name = _output("git", "rev-parse", "--short=7", "HEAD")
    if name is None:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!kernel/results")
    return name + ("-dirty" if changed else "")


def slug(device: torch.device) -> str:
    """The device in a file name: `nvidia_h200`, or `cpu`."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def describe(device: torch.device, flashinfer: str, commit_name: str | None = None) -> dict[str, str]:
    """The identity columns of a row."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        name = torch.cuda.get_device_name(device)
        query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = query.splitlines()[0] if query else "unknown"
    else:
        simd = torch.ops.mustafar.simd_level()
        name, driver = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {simd}", "none"
    return {
        "gpu": name,
        "driver": driver,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit_name or commit(),
        "torch": torch.__version__,
        "triton": _triton(),
        "cuda": (torch.version.cuda or "none") if on_gpu else "none",
        "flashinfer": flashinfer,
    }
