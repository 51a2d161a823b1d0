"""Where there is no GPU, Triton interprets its kernels. It decides so when it is first imported, so decide here."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

HERE = Path(__file__).parent
for folder in (HERE, HERE.parents[1] / "kernel_wrapper" / "tests"):  # for decode_steps.py and cases.py
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
