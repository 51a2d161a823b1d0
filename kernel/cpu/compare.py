"""The CPU kernels beside dense PyTorch in interleaved rounds, written to kernel/results/cpu_attention.json.

`python kernel/cpu/compare.py [--rounds N]`. A round calls everything once, in random order, so that whatever else the
machine does falls on all alike; minima and medians are over rounds. Dense attention is the fastest of
scaled_dot_product_attention and plain matrix products, in float32, bfloat16 and float16, a group's queries as rows
(one read of K serves them).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from mustafar import num_kept, ops
from mustafar.kernel.dense import group_rows, matmul_attention, sdpa

KV_HEADS, GROUP, TOKENS, HEAD_DIM = 8, 4, 8192, 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPARSITIES = (0.7, 0.5)
TARGET = Path(__file__).resolve().parents[1] / "results" / "cpu_attention.json"
Calls = dict[str, Callable[[], object]]


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    return " ".join(
        f"{label}{fields[key]}"
        for key, label in (("model name", ""), ("cpu family", "family "), ("model", "model "))
        if key in fields
    )


def in_rounds(calls: Calls, rounds: int) -> dict[str, dict[str, float]]:
    """Minimum and median milliseconds of each call. Each round has an order of its own, so that no call always finds
    the caches and clocks that the same other call left."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    shuffle = random.Random(0).shuffle
    for index in range(rounds + 1):
        shuffle(order)
        for name, call in order:
            start = time.perf_counter()
            call()
            if index:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"min_ms": min(t), "median_ms": statistics.median(t)} for name, t in times.items()}


def attention_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Calls, dict[str, int]]:
    """Ours by dtype and sparsity, dense ones by form and dtype; and the bytes that ours read."""
    calls: Calls = {}
    sizes: dict[str, int] = {}
    lengths = torch.tensor([[TOKENS, 0]], dtype=torch.int32)

    def repeated(
        x: torch.Tensor,
    ) -> torch.Tensor:  # what transformers' sdpa path does where heads are grouped
        return x[:, :, None].expand(-1, -1, GROUP, -1, -1).reshape(1, KV_HEADS * GROUP, TOKENS, HEAD_DIM)

    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        typed = [x.to(dtype) for x in (q, k, v)]
        rows = group_rows(typed[0], KV_HEADS)
        calls[f"sdpa {name}"] = lambda x=typed, rows=rows: sdpa(rows, *x[1:])
        calls[f"matmul {name}"] = lambda x=typed, rows=rows: matmul_attention(rows, *x[1:])
        calls[f"repeated {name}"] = lambda x=typed: F.scaled_dot_product_attention(
            x[0][:, :, None], *map(repeated, x[1:])
        )
        window = typed[1][:, :, :0]
        for sparsity in SPARSITIES:
            packed = [ops.prune_compress(x, num_kept(sparsity, HEAD_DIM)) for x in typed[1:]]
            key = f"mustafar {name} {sparsity}"
            sizes[key] = sum(c.nbytes for c in packed)
            calls[key] = lambda q=typed[0], c=packed, w=window: ops.decode_attention(q, *c, w, w, lengths)
    return calls, sizes


def pruning_calls(k: torch.Tensor) -> Calls:
    """prune_compress, and torch's topk with a gather of the values (in no order: the faster form)."""
    calls: Calls = {}
    for dtype in DTYPES:
        x, name = k.to(dtype), str(dtype).removeprefix("torch.")
        for sparsity in SPARSITIES:
            kept = num_kept(sparsity, HEAD_DIM)
            calls[f"prune_compress {name} {sparsity}"] = lambda x=x, n=kept: ops.prune_compress(x, n)
            calls[f"topk {name} {sparsity}"] = lambda x=x, n=kept: x.gather(
                -1, x.abs().topk(n, dim=-1, sorted=False).indices
            )
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, KV_HEADS, TOKENS, HEAD_DIM, generator=g)
    q = torch.randn(1, KV_HEADS * GROUP, HEAD_DIM, generator=g)

    calls, sizes = attention_calls(q, k, v)
    source = torch.ones(256 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    # Repeated heads fill caches and memory with copies: in rounds of their own.
    slow = {name: calls.pop(name) for name in list(calls) if name.startswith("repeated")}
    times = in_rounds(calls, args.rounds) | in_rounds(slow, max(3, args.rounds // 5))
    pruning = in_rounds(pruning_calls(k), max(3, args.rounds // 5))
    copy_gb_per_s = 2 * source.numel() / times.pop("copy")["min_ms"] / 1e6

    ratios = {}
    for stat in ("min_ms", "median_ms"):
        dense = min(t[stat] for n, t in times.items() if n.startswith(("sdpa", "matmul", "repeated")))
        best_sdpa = min(t[stat] for n, t in times.items() if n.startswith(("sdpa", "repeated")))
        repeated = {n.split()[1]: t[stat] for n, t in times.items() if n.startswith("repeated")}
        for name in sizes:
            row = ratios.setdefault(name, {})
            row[f"to_best_dense_{stat[:-3]}"] = dense / times[name][stat]
            row[f"to_best_sdpa_{stat[:-3]}"] = best_sdpa / times[name][stat]
            row[f"to_repeated_heads_{stat[:-3]}"] = repeated[name.split()[1]] / times[name][stat]
    for name, size in sizes.items():
        ratios[name]["compressed_gb_per_s"] = size / times[name]["min_ms"] / 1e6
    for name, t in pruning.items():
        if name.startswith("prune_compress"):
            topk = pruning[name.replace("prune_compress", "topk")]
            ratios[name] = {f"to_topk_{s[:-3]}": topk[s] / t[s] for s in ("min_ms", "median_ms")}
    report = {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "simd": torch.ops.mustafar.simd_level(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "shape": f"{KV_HEADS} KV heads x {GROUP} query heads, {TOKENS} tokens, head dim {HEAD_DIM}, no window",
        "rounds": args.rounds,
        "copy_gb_per_s": copy_gb_per_s,
        "ratios": ratios,
        "ms": times | pruning,
    }
    report = json.loads(json.dumps(report), parse_float=lambda x: float(f"{float(x):.4g}"))
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    for name, row in ratios.items():
        print(f"{name:28s}", "  ".join(f"{k} {v:.2f}" for k, v in row.items()))


if __name__ == "__main__":
    main()
