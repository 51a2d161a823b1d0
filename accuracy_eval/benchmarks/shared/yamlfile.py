"""Reading YAML files, with messages that name them."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError


def read_yaml(path: Path) -> object:
    """Return what a YAML file holds.

    Raises
    ------
    UserError
        If it cannot be read or is not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
