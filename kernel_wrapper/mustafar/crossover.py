"""Which backend decodes faster: the kernels on the compressed cache, or dense attention on the pruned one.

What `backend="auto"` of `MustafarCache` asks. The answers come from crossovers.json beside this file: measured
shapes, each with the sparsity from which on the kernels beat the fastest dense attention (cuDNN's and FlashInfer's
among them; a model's own attention may be slower than those). `make -C build bench` measures them; this command
takes them over, replacing what is there for the same GPU::

    python -m mustafar.crossover kernel/results/nvidia_h200_crossover.json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("crossovers.json")
WHAT = (
    "attention shapes, and the sparsity from which on decode attention on the compressed cache was faster than the "
    "fastest dense attention; null: not up to the highest measured. Written by python -m mustafar.crossover"
)
SHAPE = ("batch", "q_heads", "kv_heads", "tokens", "head_dim")


def faster_backend(
    device: torch.device | str,
    batch: int,
    q_heads: int,
    kv_heads: int,
    tokens: int,
    head_dim: int,
    sparsity: float,
) -> str:
    """ "kernel" or "simulate", whichever decodes faster on `device`.

    The measured shape that is nearest decides: the sum of how many times 2 lies between the sizes of both caches
    (batch x KV heads x tokens), their groups (query heads per KV head) and their head dims. There the kernels are
    faster from some sparsity on. Where nothing was measured, on a GPU that is not in the table by its full name,
    the answer is "kernel", which at least saves the memory; so it is on a CPU, where the kernels are faster at all
    lengths that matter (kernel/results/cpu_kernel_evaluation.json).

    Parameters
    ----------
    device : torch.device or str
    batch, q_heads, kv_heads, tokens, head_dim : int
        Of one layer's cache. A parallel rank passes its own heads.
    sparsity : float
        Fraction of zeros; the mean of keys' and values' where they differ, as their bytes add up.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "kernel"
    return _decide(_gpu_name(device), batch, q_heads, kv_heads, tokens, head_dim, sparsity)


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _decide(
    gpu: str, batch: int, q_heads: int, kv_heads: int, tokens: int, head_dim: int, sparsity: float
) -> str:
    shapes = [shape for entry in read_table(TABLE) if entry["gpu"] == gpu for shape in entry["shapes"]]
    if not shapes or min(batch, q_heads, kv_heads, tokens, head_dim) < 1:
        return "kernel"

    def distance(shape: dict[str, Any]) -> float:
        ratios = (
            shape["batch"] * shape["kv_heads"] * shape["tokens"] / (batch * kv_heads * tokens),
            shape["q_heads"] / shape["kv_heads"] / (q_heads / kv_heads),
            shape["head_dim"] / head_dim,
        )
        return sum(abs(math.log2(ratio)) for ratio in ratios)

    least = min(shapes, key=distance)["sparsity"]
    return "kernel" if least is not None and sparsity >= least else "simulate"


@functools.lru_cache
def read_table(path: Path) -> list[dict[str, Any]]:
    """The GPUs of a table: name, run and shapes.

    Raises
    ------
    ValueError
        If the file is not such a table.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["gpus"]
        for shape in (shape for entry in found for shape in entry["shapes"]):
            least = shape["sparsity"]
            if min(shape[name] for name in SHAPE) < 1 or not (least is None or 0 <= least < 1):
                raise ValueError(f"shape out of range: {shape}")
        if not all(isinstance(entry["gpu"], str) for entry in found):
            raise TypeError("a GPU's name is text")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of crossovers ({type(error).__name__}: {error})") from error
    return found


def merge(table: list[dict[str, Any]], report: dict[str, Any]) -> list[dict[str, Any]]:
    """`table` with what a benchmark's report measured, in place of what it held for the same GPU.

    Of shapes that were measured in several dtypes float16 stays; times are those outside of CUDA graphs.

    Raises
    ------
    ValueError
        If the report holds no GPU, several, or no attention shape.
    """
    names = {run["gpu"] for run in report["runs"]}
    if len(names) != 1:
        raise ValueError(f"the report is of {len(names)} devices, expected one: {sorted(names)}")
    (gpu,) = names
    if all(run.get("cuda") in (None, "", "none") for run in report["runs"]):
        raise ValueError(f"the report is of {gpu!r}, and the table is for GPUs: on a CPU the kernels decide")
    shapes: dict[tuple[int, ...], dict[str, Any]] = {}
    for measured in sorted(report["shapes"], key=lambda shape: shape["dtype"] != "float16"):
        answer = measured["eager"]
        least = None if answer["relation"] == ">" else answer["sparsity"]
        key = tuple(measured[name] for name in SHAPE)
        shapes.setdefault(key, dict(zip(SHAPE, key, strict=True)) | {"sparsity": least})
    if not shapes:
        raise ValueError("the report holds no attention shape measured at two sparsities or more")
    latest = max(report["runs"], key=lambda run: str(run["date"]))
    run = {name: latest[name] for name in ("date", "commit", "torch", "cuda") if name in latest}
    entry = {"gpu": gpu, "run": run, "shapes": [shapes[key] for key in sorted(shapes)]}
    return sorted([old for old in table if old["gpu"] != gpu] + [entry], key=lambda entry: entry["gpu"])


def write_table(path: Path, table: list[dict[str, Any]]) -> None:
    """One line per shape, so that a changed measurement is a changed line."""
    gpus = []
    for entry in table:
        shapes = ",\n".join(f"    {json.dumps(shape)}" for shape in entry["shapes"])
        head = f'  {{"gpu": {json.dumps(entry["gpu"])}, "run": {json.dumps(entry["run"])}, "shapes": ['
        gpus.append(f"{head}\n{shapes}\n  ]}}")
    body = "[\n" + ",\n".join(gpus) + "\n ]" if gpus else "[]"
    path.write_text(f'{{\n "what": {json.dumps(WHAT)},\n "gpus": {body}\n}}\n', encoding="utf-8")
    read_table.cache_clear()


def main(arguments: Sequence[str] | None = None) -> int:
    """Take over a report's crossovers; 2 if it cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m mustafar.crossover",
        description='Take over measured crossovers into the table of backend="auto".',
    )
    parser.add_argument(
        "report", type=Path, help="<gpu>_crossover.json of make -C build bench (kernel/results)"
    )
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="the table to change (default: the package's)"
    )
    args = parser.parse_args(arguments)
    try:
        report = json.loads(args.report.read_text(encoding="utf-8"))
        table = merge(read_table(args.table) if args.table.exists() else [], report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: {args.report}: {type(error).__name__}: {error}\n")
    write_table(args.table, table)
    print(f"{args.table}: " + ", ".join(f"{entry['gpu']}, {len(entry['shapes'])} shapes" for entry in table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
