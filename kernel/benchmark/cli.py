"""Options, the run itself, and what is printed."""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from . import flashinfer_peer, machine, plots, report
from .measure import Bench
from .shapes import SECTIONS, Case, plan
from .timing import Timer

#: How the note on a case begins that raised an error.
FAILED = "FAILED:"
RESULTS = machine.ROOT / "kernel" / "results"


def sections(text: str) -> tuple[str, ...]:
    """`text`, names with commas between, as sections in their usual order."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"unknown section {', '.join(unknown) or repr(text)}; valid: {', '.join(SECTIONS)}"
        )
    return tuple(name for name in SECTIONS if name in names)


def milliseconds(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 60_000:
        raise argparse.ArgumentTypeError(f"expected milliseconds above 0 and below 60000, got {text!r}")
    return value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__.split("\n")[0])
    parser.description = "Benchmark the kernels next to the best dense ones: a CSV, plots and crossovers."
    parser.add_argument(
        "--only", type=sections, default=SECTIONS, metavar="SECTIONS",
        help=f"measure only these, separated by commas: {', '.join(SECTIONS)}. Rows of the others stay in the CSV",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="a smoke run: tiny shapes, few repetitions, written to build/out/bench unless --output says otherwise",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER",
        help="where <gpu>.csv, <gpu>_crossover.json and the plots go (default: kernel/results)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:<n> (default: the GPU if there is one)",
    )  # fmt: skip
    parser.add_argument("--no_flashinfer", action="store_true", help="leave FlashInfer out, installed or not")
    parser.add_argument("--no_plots", action="store_true", help="write the CSV and the crossovers only")
    parser.add_argument(
        "--warmup_ms", type=milliseconds, help="of each GPU measurement, in milliseconds (default: 10)"
    )
    parser.add_argument(
        "--rep_ms", type=milliseconds,
        help="how long each measurement repeats its call, in milliseconds; ten times that on a CPU (default: 50)",
    )  # fmt: skip
    parser.add_argument("--commit", metavar="NAME", help="the commit measured, where git cannot tell")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device must be cpu, cuda or cuda:<n>, got {args.device!r}")
    if args.device != "cpu" and int(args.device[5:] or 0) >= torch.cuda.device_count():
        parser.error(f"--device {args.device}: this torch sees {torch.cuda.device_count()} GPUs")
    if args.device != "cpu" and not torch.ops.mustafar.has_cuda():
        parser.error(
            f"--device {args.device}: mustafar was built without its CUDA kernels (make -C build ext)"
        )
    args.output = args.output or (machine.ROOT / "build/out/bench" if args.quick else RESULTS)
    args.warmup_ms = args.warmup_ms or (2.0 if args.quick else 10.0)
    args.rep_ms = args.rep_ms or (5.0 if args.quick else 50.0)
    return args


def find_flashinfer(args: argparse.Namespace, cases: list[Case]) -> tuple[str, list[str]]:
    """What the report's `flashinfer` column says, and notes on why FlashInfer is not measured, if so."""
    if args.device == "cpu":
        return "none", []
    if args.no_flashinfer:
        return "left out", ["FlashInfer: left out (--no_flashinfer)"]
    found = flashinfer_peer.version()
    if not flashinfer_peer.usable(found):
        return found, [f"FlashInfer: {found}, so the best dense kernel is the best of the others"]
    print(f"FlashInfer {found}: building its kernels, minutes if they are not cached", flush=True)
    start = time.perf_counter()
    try:
        flashinfer_peer.build(cases)
    except Exception as error:  # whatever its build raises, the rest can be measured; the report says so
        print(str(error)[-4000:], flush=True)
        return f"{found} does not build", [f"FlashInfer {found}: {flashinfer_peer.first_line(error)}"]
    print(f"FlashInfer's kernels: {time.perf_counter() - start:.0f} s", flush=True)
    return found, []


def measure(
    args: argparse.Namespace, path: Path, old: list[report.Row]
) -> tuple[list[report.Row], list[str]]:
    """Run the cases, writing the CSV, with the `old` rows of other sections, after each; its rows, and notes."""
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    cases = plan(args.only, device.type == "cuda", args.quick)
    flashinfer, notes = find_flashinfer(args, cases)
    identity = machine.describe(device, flashinfer, args.commit)
    print(", ".join(f"{name} {value}" for name, value in identity.items()), flush=True)
    timer = Timer(device, args.warmup_ms, args.rep_ms)
    rows, new, begun = old, [], time.perf_counter()
    with timer.on_device(), torch.no_grad():
        bench = Bench(timer, timer.copy_tb_per_s(), flashinfer_peer.usable(flashinfer))
        print(f"copy: {bench.copy_tb_per_s:.3f} TB/s, read and written", flush=True)
        for case in cases:
            start = time.perf_counter()
            try:
                for row in bench.run(case):
                    new.append(identity | row)
            except Exception as error:  # the other cases may well run, and machine time is dear
                traceback.print_exc()
                timer.synchronize()  # not after an error of the device itself
                bench.notes.append(
                    f"{FAILED} {case.section}, {case.shape}: {flashinfer_peer.first_line(error)}"
                )
            timer.free()
            rows = report.merged(old, new, args.only)
            report.write_csv(path, rows)
            now = time.perf_counter()
            print(f"[{now - begun:4.0f} s] {case.section}: {case.shape} ({now - start:.1f} s)", flush=True)
    return rows, notes + bench.notes


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 if a result was inaccurate or a case failed."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    slug = machine.slug(torch.device(args.device))
    path = args.output / f"{slug}.csv"
    try:
        old = report.read_csv(path) if path.exists() else []
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, notes = measure(args, path, old)
    written = [path, args.output / f"{slug}_crossover.json"]
    found = report.write_crossovers(written[1], rows)
    if not args.no_plots:
        try:
            written += plots.draw(rows, args.output, slug)
        except ModuleNotFoundError as error:
            notes.append(f"no plots: {error}")
    shown = [row for row in rows if row["section"] in args.only]
    print("\nFaster than the best dense attention, by sparsity:")
    for entry in found:
        if entry["section"] in args.only:
            print(f"  {report.say_crossover(entry)}")
    for note in notes:
        print(f"note: {note}")
    wrong = [row for row in shown if row.get("accurate") is False]
    for row in wrong:
        print(f"INACCURATE: {row['op']}, {row['layout']}, sparsity {row['sparsity']:g}, batch {row['batch']}, "
              f"{row['tokens']} tokens, D {row['head_dim']}, {row['dtype']}: error {row['max_error']}")  # fmt: skip
    print("wrote " + ", ".join(str(file) for file in written) + "\n")
    if args.only == SECTIONS:  # the two series have plots, and the table should fit a screen or two
        shown = [row for row in shown if row["section"] not in ("context", "batch")]
    print(report.table(shown))
    return 1 if wrong or any(note.startswith(FAILED) for note in notes) else 0
