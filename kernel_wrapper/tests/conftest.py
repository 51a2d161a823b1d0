"""Devices and dtypes the ops are tested on: the CPU always, a GPU where there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for cases.py

HALF = (torch.float16, torch.bfloat16)
CPU = [pytest.param(("cpu", dtype), id=f"cpu-{str(dtype)[6:]}") for dtype in (*HALF, torch.float32)]
GPU = [
    pytest.param(
        ("cuda", dtype),
        id=f"cuda-{str(dtype)[6:]}",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ],
    )
    for dtype in HALF
]


@pytest.fixture(params=CPU + GPU)
def target(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """(device, dtype) of a test that runs everywhere."""
    return request.param
