#!/usr/bin/env python3
"""compute-sanitizer over every GPU op: memcheck, racecheck, initcheck and synccheck, a line per tool and case.

    python kernel/tests/sanitize.py                    # all; exit status 1 if anything was found or did not run
    python kernel/tests/sanitize.py --tools memcheck --cases "attention 256" --logs /tmp/logs

First it makes sure that a clean report means something: each tool has to find the mistake planted for it in a kernel
of namespace mustafar, and memcheck the wild reads of every op that is given offsets beyond its values.

Inputs are packed on the CPU and copied, PyTorch's caching allocator is off, and no kernel but ours runs (but for
compression, which initcheck leaves out): only the kernels named below are instrumented, and initcheck would take what
others write for uninitialised.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KERNELS = ("mustafar", "_prune_compress_kernel", "_count_kernel", "_fill_kernel", "_decompress_kernel")
IN_OUR_KERNEL = re.compile(rf"(=+ +at|access at|Device Frame:) [^\n]*({'|'.join(KERNELS)})")
FOUND, TIMEOUT_S = 99, 150

# Case: what decode_steps.step takes. Small: racecheck runs kernels some hundred times slower.
UNIFORM, GENERAL = ("uniform", "uniform"), ("general", "general")
ATTENTION = {
    "64": {"head_dim": 64},
    "128": {"tokens": 600},
    "128 bf16 group 8": {"dtype": "bfloat16", "group": 8, "heads": 1},
    "128 general": {"layouts": GENERAL, "tokens": 200},
    "128 mixed layouts, group 5": {"layouts": ("uniform", "general"), "group": 5, "kept": (13, 128)},
    "128 other way round, group 1": {"layouts": ("general", "uniform"), "group": 1, "kept": (128, 13)},
    "128 group 12": {"group": 12, "heads": 1},
    "256": {"head_dim": 256, "heads": 1},
    "256 general bf16": {"head_dim": 256, "heads": 1, "layouts": GENERAL, "dtype": "bfloat16"},
    "80 general, group 3": {"head_dim": 80, "group": 3, "layouts": GENERAL},
    "200": {"head_dim": 200, "heads": 1},
    "many splits": {"batch": 1, "heads": 1, "tokens": 6000, "window": 33},
    "one split": {"batch": 40, "heads": 4, "group": 2, "tokens": 65, "window": 1},
    "slice after slice": {"batch": 264, "heads": 1, "tokens": 900, "window": 70},
    "slice after slice, group 8": {"batch": 264, "heads": 1, "group": 8, "tokens": 900, "window": 70},
    "no slice": {"tokens": 0, "window": 70},
    "no window": {"window": 0},
    "one token": {"tokens": 1, "window": 0},
    "padding": {"tokens": 300, "starts": [130, 341]},
    "sliding window": {"tokens": 300, "sliding_window": 70},
    "unfilled": {"tokens": 600, "lengths": [[130, 3], [0, 0]], "garbage": [130, 0]},
    "unfilled general": {"tokens": 600, "lengths": [[130, 3], [0, 0]], "garbage": [130, 0], "layouts": GENERAL},
    "runs of zeros": {"pattern": "long_runs", "layouts": GENERAL},
    "all zero": {"pattern": "zeros", "layouts": GENERAL},
}  # fmt: skip
SPMV = {
    "64": {"head_dim": 64},
    "128": {"tokens": 600},
    "128 general bf16": {"layouts": GENERAL, "dtype": "bfloat16"},
    "128 group 12": {"group": 12, "heads": 1},
    "256": {"head_dim": 256},
    "80 general": {"head_dim": 80, "layouts": GENERAL, "group": 1},
    "runs of zeros": {"pattern": "long_runs", "layouts": GENERAL},
    "one token": {"tokens": 1},
}
COMPRESSION = {
    "128": {"tokens": 200},
    "80 bf16": {"head_dim": 80, "dtype": "bfloat16"},
    "256": {"head_dim": 256},
}
CASES = {
    **{f"attention {name}": shape for name, shape in ATTENTION.items()},
    **{f"key_scores {name}": shape for name, shape in SPMV.items()},
    **{f"value_output {name}": shape for name, shape in SPMV.items()},
    **{f"compression {name}": shape for name, shape in COMPRESSION.items()},
}
# Each reads where its offsets point.
WILD = (
    "attention 128 general",
    "key_scores 128 general bf16",
    "value_output 128 general bf16",
    "decompress 128",
)

PLANTED = """
#include <cuda_runtime.h>
namespace mustafar {
__global__ void memcheck(int* x) { x[threadIdx.x + 4096] = 1; }
__global__ void racecheck(int* x) {
  __shared__ int s[64];
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void initcheck(int* x, const int* never_written) { x[threadIdx.x] = never_written[threadIdx.x]; }
__global__ void synccheck(int* x) {  // a mask without the threads that call
  if (threadIdx.x >= 16) __syncwarp(0xffff);
  x[threadIdx.x] = 1;
}
}  // namespace mustafar
int main(int, char** argv) {
  int *x, *never_written;
  if (cudaMalloc(&x, 256) || cudaMalloc(&never_written, 256) || cudaMemset(x, 0, 256)) return 2;
  switch (argv[1][0]) {
    case 'm': mustafar::memcheck<<<1, 64>>>(x); break;
    case 'r': mustafar::racecheck<<<1, 64>>>(x); break;
    case 'i': mustafar::initcheck<<<1, 64>>>(x, never_written); break;
    case 's': mustafar::synccheck<<<1, 32>>>(x); break;
  }
  return cudaDeviceSynchronize() != cudaSuccess;
}
"""


# What runs under the sanitizer


def run_cases(names: list[str], wild: bool) -> None:
    """Run each case on the GPU and compare it with the CPU kernels. `wild`: with offsets beyond the values."""
    for folder in (HERE, HERE.parents[1] / "kernel_wrapper" / "tests"):
        sys.path.insert(0, str(folder))
    import torch
    from decode_steps import step, with_garbage
    from mustafar import ops

    def on_gpu(x):
        return x.to("cuda") if hasattr(x, "to") else x

    for name in names:
        op = name.split()[0]
        options = dict(CASES.get(name) or {"layouts": GENERAL})
        dtype, garbage = getattr(torch, options.pop("dtype", "float16")), options.pop("garbage", None)
        host = step("cpu", dtype, **options)
        if garbage:
            host |= {part: with_garbage(host[part], garbage) for part in "kv"}
        there = {part: on_gpu(x) for part, x in host.items()}
        if wild:
            for part in "kv":
                c = host[part]
                there[part] = on_gpu(dataclasses.replace(c, offsets=c.offsets + (1 << 26)))
        g = torch.Generator().manual_seed(0)
        p = torch.randn(*host["q"].shape[:2], host["v"].tokens, generator=g).softmax(-1).to(dtype)
        x = torch.randn(2, 2, host["k"].tokens, host["k"].head_dim, generator=g).to(dtype)
        work = {
            "attention": lambda a, to: [ops.decode_attention(**a)],
            "key_scores": lambda a, to: [ops.key_scores(a["q"], a["k"])],
            "value_output": lambda a, to, p=p: [ops.value_output(to(p), a["v"])],
            "decompress": lambda a, to: [ops.decompress(a["k"])],
            "compression": lambda a, to, x=x: compressions(ops, to(x)),
        }[op]
        got = [part.cpu() for part in work(there, on_gpu)]
        torch.cuda.synchronize()
        for ours, cpu in zip(got, work(host, lambda x: x), strict=True):
            near = 0 if op in ("compression", "decompress") else 2e-2
            torch.testing.assert_close(ours, cpu, atol=near, rtol=near, msg=name)
        print(f"ran: {name}", flush=True)


def compressions(ops, x) -> list:
    """Every part that the compression ops return."""
    uniform, general = ops.prune_compress(x, x.shape[3] * 3 // 10), ops.compress(x)
    tables = [uniform.bitmap, uniform.values, general.bitmap, general.values, general.offsets, general.widths]
    return [*tables, ops.decompress(uniform), ops.decompress(general)]


# The sanitizer


@dataclasses.dataclass
class Report:
    tool: str
    name: str
    log: str  # of the sanitizer
    output: str  # of the program
    status: int | None  # None: stopped at the time limit
    seconds: float

    @property
    def errors(self) -> int | None:
        """What the summary counts, None without one."""
        found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", self.log)
        return max(int(a or b) for a, b in found) if found else None

    @property
    def clean(self) -> bool:
        return self.status == 0 and self.errors == 0

    @property
    def verdict(self) -> str:
        if self.clean:
            return "ok"
        if self.status is None:
            return f"did not end within {TIMEOUT_S} s"
        return (
            f"{self.errors} errors, exit status {self.status}"
            if self.errors
            else f"failed, status {self.status}"
        )


def sanitize(sanitizer: str, tool: str, name: str, command: list[str], logs: Path) -> Report:
    stem = re.sub(r"\W+", "-", f"{tool}-{name}")
    log, output = logs / f"{stem}.log", logs / f"{stem}.out"
    filters = [part for kernel in KERNELS for part in ("--kernel-name", f"kernel_substring={kernel}")]
    options = [
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        "--report-api-errors",
        "no",
        "--log-file",
        str(log),
    ]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    start = time.monotonic()
    with output.open("w") as file:
        process = subprocess.Popen(
            [sanitizer, *options, *filters, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the program that it runs as well
            process.wait()
            status = None
    seconds = time.monotonic() - start
    text = log.read_text(errors="replace") if log.exists() else ""
    return Report(tool, name, text, output.read_text(errors="replace"), status, seconds)


def driver(names: list[str], *options: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--run", "|".join(names), *options]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument(
        "--cases", nargs="+", default=[""], help="only cases whose name contains one of these"
    )
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    parser.add_argument("--logs", type=Path, help="keep the reports in this folder")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--wild", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_cases(args.run.split("|"), args.wild)
        return 0
    cases = [name for name in CASES if any(part in name for part in args.cases)]
    if args.list:
        print("\n".join(cases))
        return 0
    if not cases:
        parser.error(f"no case has one of {args.cases} in its name")
    sanitizer, nvcc = (shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}") for name in
                       ("compute-sanitizer", "nvcc"))  # fmt: skip
    if not sanitizer or not nvcc:
        print("sanitize.py needs compute-sanitizer and nvcc of a CUDA toolkit")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        logs = args.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        source, planted = Path(folder, "planted.cu"), Path(folder, "planted")
        source.write_text(PLANTED)
        subprocess.run([nvcc, "-arch=native", "-lineinfo", str(source), "-o", str(planted)], check=True)
        return check(
            args.tools, cases, args.jobs, lambda *work: sanitize(sanitizer, *work, logs), str(planted)
        )


def check(tools: tuple[str, ...], cases: list[str], jobs: int, run, planted: str) -> int:
    start, bad = time.monotonic(), 0

    def say(tool: str, name: str, verdict: str, detail: str = "") -> None:
        print(f"{tool:10} {name:48} {verdict}{detail}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        whole = {}
        for tool in sorted(tools, key=TOOLS.index, reverse=True):  # the slow ones first
            # torch's kernels write some of what the compression kernels read, and initcheck does not see them do it.
            names = [name for name in cases if tool != "initcheck" or not name.startswith("compression")]
            if names:
                whole[tool] = names, pool.submit(run, tool, "all cases", driver(names))
        plants = [pool.submit(run, tool, "planted mistake", [planted, tool]) for tool in tools]
        if "memcheck" in tools:
            plants += [
                pool.submit(run, "memcheck", f"wild {name}", driver([name], "--wild")) for name in WILD
            ]
        for future in plants:
            report = future.result()
            found = bool(report.errors) and IN_OUR_KERNEL.search(report.log) is not None
            say(
                report.tool,
                report.name,
                "found, as it must be" if found else "NOT FOUND: the tool sees nothing",
            )
            if not found:
                bad += 1
                print(report.log[-2000:], report.output[-2000:])
        for tool, (names, future) in whole.items():
            report = future.result()
            if report.clean and all(f"ran: {name}\n" in report.output for name in names):
                for name in names:
                    say(tool, name, "ok")
                continue
            say(tool, "all cases", report.verdict, ": now one by one")
            for alone in pool.map(lambda name, tool=tool: run(tool, name, driver([name])), names):
                say(tool, alone.name, alone.verdict)
                if not alone.clean:
                    print(alone.log[:4000] or alone.output[-2000:])
            bad += 1  # whether or not the cases do alone what they did together
    print(
        f"{'FAILED' if bad else 'clean'}: {len(cases)} cases, {len(tools)} tools, {time.monotonic() - start:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
