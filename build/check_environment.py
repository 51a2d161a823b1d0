"""Say which packages of requirements.txt the current Python lacks, or has in another version."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

#: Without these nothing runs; the rest is needed by the evaluation, the tests or the build only.
NEEDED = {"torch", "transformers", "setuptools"}


def main(path: str) -> None:
    missing, other = [], []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        match = re.match(r"([\w-]+)(==([\w.]+))?", line)
        if not match:
            continue
        name, _, wanted = match.groups()
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if wanted and found.split("+")[0] != wanted:
            other.append(f"{name} {found} (pinned {wanted})")
    if other:
        print("current Python: other versions than pinned:", ", ".join(other))
    if missing:
        print("current Python: missing", ", ".join(missing), "- pip install -r requirements.txt")
    if NEEDED & set(missing):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
