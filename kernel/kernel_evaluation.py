"""Is it right, how fast is it, how small is it: in that order, on a GPU or a CPU.

    python kernel/kernel_evaluation.py
    python kernel/kernel_evaluation.py --batch 8 --kv_heads 8 --q_heads 32 --tokens 8192 --json out.json

For each sparsity: every op is checked against dense computation on the same pruned keys and values, then timed
next to dense PyTorch, then the compressed cache is written to a file, read back and compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from mustafar import CompressedTensor, num_kept, ops, pruning, reference
from mustafar.format import MAX_HEAD_DIM, check_sparsity
from mustafar.kernel.dense import dense_output, dense_scores, group_rows, host_ms, matmul_attention, sdpa
from mustafar.testing import accuracy
from safetensors.torch import load_file, save_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--q_heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096, help="compressed tokens per sequence")
    parser.add_argument("--window", type=int, default=32, help="dense tokens behind them, the local window")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7], help="fractions of zeros")
    parser.add_argument("--k_rule", default="Kt_Mag", help="pruning rule of the keys")
    parser.add_argument("--v_rule", default="Vt_Mag", help="pruning rule of the values")
    parser.add_argument(
        "--group_size", type=int, default=32, help="tokens ranked together by channel-wise rules"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FILE", help="keep the last compressed cache here (safetensors)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    args = parser.parse_args(argv)
    try:
        for sparsity in args.sparsity:
            check_sparsity(sparsity, "--sparsity")
        rules = {
            "--k_rule": pruning.get_rule(args.k_rule, "K"),
            "--v_rule": pruning.get_rule(args.v_rule, "V"),
        }
    except ValueError as error:
        parser.error(str(error))
    for option, rule in rules.items():
        if rule.observes:
            parser.error(
                f"{option} {rule.name} scores by recent queries, and here there are none: try a model"
            )
    if min(args.batch, args.q_heads, args.kv_heads, args.tokens, args.head_dim) < 1 or args.window < 0:
        parser.error("--batch, --q_heads, --kv_heads, --tokens and --head_dim must be at least 1, --window 0")
    if args.head_dim > MAX_HEAD_DIM:
        parser.error(f"--head_dim must be at most {MAX_HEAD_DIM}, got {args.head_dim}")
    if args.q_heads % args.kv_heads:
        parser.error(f"--q_heads {args.q_heads} is not a multiple of --kv_heads {args.kv_heads}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device must be cpu, cuda or cuda:<n>, got {args.device!r}")
    if args.device != "cpu" and int(args.device[5:] or 0) >= torch.cuda.device_count():
        parser.error(f"--device {args.device}: this torch sees {torch.cuda.device_count()} GPUs")
    return args


def median_ms(call: Callable[[], object], device: str) -> float:
    """Median milliseconds of `call`, the caches cold on a GPU as they are between layers of a model."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return do_bench(call, return_mode="median")
    return statistics.median(host_ms(call))


class Problem:
    """Random queries, keys and values of one decode step, and dense computation on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        dtype, device = DTYPES[args.dtype], args.device

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        b, h, hkv, t, d = args.batch, args.q_heads, args.kv_heads, args.tokens, args.head_dim
        self.q = random(b, h, d)
        self.k, self.v = random(b, hkv, t, d), random(b, hkv, t, d)
        self.k_window, self.v_window = random(b, hkv, args.window, d), random(b, hkv, args.window, d)
        self.p = random(b, h, t).float().softmax(-1).to(dtype)
        self.lengths = torch.tensor([[t, args.window]] * b, dtype=torch.int32, device=device)
        self.rows = group_rows(self.q, hkv)  # [B, Hkv, G, D]

    def scores(self, k: torch.Tensor) -> torch.Tensor:
        return dense_scores(self.rows.to(k.dtype), k)

    def output(self, v: torch.Tensor) -> torch.Tensor:
        return dense_output(self.p.to(v.dtype), v)

    def attention(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(self.rows.to(k.dtype), k, v)

    def matmul_attention(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return matmul_attention(self.rows.to(k.dtype), k, v)

    def joined(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([k, self.k_window.to(k.dtype)], 2), torch.cat([v, self.v_window.to(v.dtype)], 2)


def dense_times(problem: Problem, args: argparse.Namespace) -> dict[str, float]:
    """Dense milliseconds, of the fastest way PyTorch has; on a CPU of all dtypes, for half precision may be slow."""
    dtypes = [DTYPES[args.dtype]]
    if args.device == "cpu":
        dtypes = list(dict.fromkeys([*dtypes, torch.bfloat16, torch.float32]))
    best: dict[str, float] = {}
    for dtype in dtypes:
        k, v = problem.k.to(dtype), problem.v.to(dtype)
        joined = problem.joined(k, v)
        for name, call in (
            ("key_scores", lambda k=k: problem.scores(k)),
            ("value_output", lambda v=v: problem.output(v)),
            ("attention", lambda joined=joined: problem.attention(*joined)),
            ("attention", lambda joined=joined: problem.matmul_attention(*joined)),
        ):
            ms = median_ms(call, args.device)
            best[name] = min(ms, best.get(name, ms))
    return best


def check(problem: Problem, k: CompressedTensor, v: CompressedTensor) -> dict[str, str]:
    """Each op against dense float32 on the same pruned tensors; the failures, by op."""
    dense_k, dense_v = reference.decompress(k), reference.decompress(v)
    joined = problem.joined(dense_k, dense_v)
    exact = {
        "key_scores": reference.key_scores(problem.q, k),
        "value_output": reference.value_output(problem.p, v),
        "decode_attention": problem.attention(*(x.float() for x in joined)),
    }
    peers = {
        "key_scores": problem.scores(dense_k),
        "value_output": problem.output(dense_v),
        "decode_attention": problem.attention(*joined),
    }
    got = {
        "key_scores": ops.key_scores(problem.q, k),
        "value_output": ops.value_output(problem.p, v),
        "decode_attention": fused(problem, k, v),
    }
    results = {name: accuracy(got[name], peers[name], exact[name]) for name in got}
    failures = {name: str(result) for name, result in results.items() if not result.ok}
    for name, c, dense in (("decompress of keys", k, dense_k), ("decompress of values", v, dense_v)):
        if not torch.equal(reference.as_bits(ops.decompress(c)), reference.as_bits(dense)):
            failures[name] = "differs from the reference"
    return failures


def fused(problem: Problem, k: CompressedTensor, v: CompressedTensor) -> torch.Tensor:
    return ops.decode_attention(problem.q, k, v, problem.k_window, problem.v_window, problem.lengths)


def save_and_verify(k: CompressedTensor, v: CompressedTensor, keep: str | None) -> int:
    """Write the cache to a safetensors file, read it back, compare; the file's bytes. Raises on a difference."""
    state = {
        f"{name}.{part}": t.cpu() for name, c in (("k", k), ("v", v)) for part, t in c.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(keep or Path(folder) / "cache.safetensors")
        save_file(state, path)
        loaded = load_file(path)
        for name, c in (("k", k), ("v", v)):
            parts = {n.removeprefix(f"{name}."): t for n, t in loaded.items() if n.startswith(f"{name}.")}
            again = CompressedTensor.from_state_dict(parts)
            if not torch.equal(
                reference.as_bits(reference.decompress(again)),
                reference.as_bits(reference.decompress(c)).cpu(),
            ):
                raise RuntimeError(f"{path}: the reloaded cache differs from the saved one")
        return path.stat().st_size


def prune_and_compress(x: torch.Tensor, rule: pruning.Pruning) -> CompressedTensor:
    """As the cache does: in one pass where the rule allows it, else prune and pack what is left."""
    if rule.rule.fused:
        return ops.prune_compress(x, rule.kept(x.shape[-1]))
    return ops.compress(rule.prune(x))


def evaluate(problem: Problem, sparsity: float, dense: dict[str, float], args: argparse.Namespace) -> dict:
    prune_k = pruning.Pruning(pruning.get_rule(args.k_rule, "K"), sparsity, args.group_size)
    prune_v = pruning.Pruning(pruning.get_rule(args.v_rule, "V"), sparsity, args.group_size)

    def compress_k() -> CompressedTensor:
        return prune_and_compress(problem.k, prune_k)

    def compress_v() -> CompressedTensor:
        return prune_and_compress(problem.v, prune_v)

    k, v = compress_k(), compress_v()
    failures = check(problem, k, v)
    print(f"\nsparsity {sparsity:g} ({args.k_rule} + {args.v_rule}, {num_kept(sparsity, args.head_dim)} of "
          f"{args.head_dim} kept)\n  Are results equal? {not failures}")  # fmt: skip
    for name, detail in failures.items():
        print(f"    {name}: {detail}")

    times = {
        "prune_compress": median_ms(compress_k, args.device) + median_ms(compress_v, args.device),
        "key_scores": median_ms(lambda: ops.key_scores(problem.q, k), args.device),
        "value_output": median_ms(lambda: ops.value_output(problem.p, v), args.device),
        "attention": median_ms(lambda: fused(problem, k, v), args.device),
    }
    tokens = args.batch * args.tokens
    print(f"  prune + compress K and V   {times['prune_compress'] * 1e3 / tokens:9.3f} us per token")
    for name, label in (
        ("key_scores", "batched SpMV, keys      "),
        ("value_output", "batched SpMV, values    "),
        ("attention", "fused decode attention  "),
    ):
        print(f"  {label}   {times[name]:9.3f} ms   {dense[name] / times[name]:5.2f}x the speed of dense")

    file_bytes = save_and_verify(k, v, args.save)
    print(f"  size of K: {k.nbytes / 1e6:.1f} MB of {k.dense_nbytes / 1e6:.1f} MB dense "
          f"({k.nbytes / k.dense_nbytes:.4f}), of V: {v.nbytes / 1e6:.1f} MB")  # fmt: skip
    print(f"  saved K and V ({file_bytes / 1e6:.1f} MB), reloaded, verified: True")
    return {
        "sparsity": sparsity,
        "equal": not failures,
        "failures": failures,
        "ms": times,
        "prune_compress_us_per_token": times["prune_compress"] * 1e3 / tokens,
        "speedup_over_dense": {name: dense[name] / times[name] for name in dense},
        "bytes": {"k": k.nbytes, "v": v.nbytes, "dense": k.dense_nbytes, "file": file_bytes},
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {torch.ops.mustafar.simd_level()}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(f"{device_name(args.device)}; torch {torch.__version__}; {args.dtype}")
    print(f"batch {args.batch}, {args.q_heads} query heads on {args.kv_heads} KV heads of {args.head_dim}, "
          f"{args.tokens} tokens + a window of {args.window}")  # fmt: skip
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    problem = Problem(args)
    with torch.inference_mode():
        dense = dense_times(problem, args)
        print(f"\ndense: batched MV with keys {dense['key_scores']:.3f} ms, with values "
              f"{dense['value_output']:.3f} ms, attention {dense['attention']:.3f} ms, "
              f"{problem.k.nbytes / 1e6:.1f} MB each of K and V")  # fmt: skip
        results = [evaluate(problem, sparsity, dense, args) for sparsity in args.sparsity]
    if args.json:
        report = {
            "device": device_name(args.device),
            "torch": torch.__version__,
            "arguments": {name: value for name, value in vars(args).items() if name not in ("json", "save")},
            "dense_ms": dense,
            "results": results,
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwrote {args.json}")
    return 0 if all(result["equal"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
