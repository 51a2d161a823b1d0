"""Loads the native extension, or says how to build it."""

from __future__ import annotations

import importlib

import torch

BUILD_HINT = "build it with `make -C build ext` (or `pip install -e kernel_wrapper`)"


def load() -> None:
    """Import `mustafar._C`, which registers torch.ops.mustafar.

    Raises
    ------
    ImportError
        Where it is not built, or was built for another torch, with the command to run.
    """
    try:
        importlib.import_module("mustafar._C")
    except ModuleNotFoundError as error:
        if error.name != "mustafar._C":
            raise
        raise ImportError(f"mustafar's native extension is not built: {BUILD_HINT}") from error
    except ImportError as error:
        raise ImportError(
            f"mustafar's native extension does not load ({error}); it was probably built for another torch than "
            f"{torch.__version__}: {BUILD_HINT} again"
        ) from error
