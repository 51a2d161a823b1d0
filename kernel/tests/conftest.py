"""Where there is no GPU, Triton interprets its kernels. It decides so when it is first imported, so decide here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
