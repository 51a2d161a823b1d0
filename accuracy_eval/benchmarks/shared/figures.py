"""Writing figures, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .store import replace_file


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG that a kill or a full disk cannot cut off.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    replace_file(path, content.getvalue())
