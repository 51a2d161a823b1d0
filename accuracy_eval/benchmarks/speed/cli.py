"""The command line of mem_spd_test.py."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..shared.errors import UserError
from .modes import HELP, Mode, parse
from .presets import PRESETS

SECTIONS = ("steps", "generation", "largest")
DEFAULT_MODES = ["dense", "dense-static", "dense-flash", "mustafar-0.5", "mustafar-0.7"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="mem_spd_test.py",
        description="Memory and speed of generation. Sections: steps (decode steps on a cache filled at random), "
        "generation (real prompts: time to first token, tokens per second, peak memory), largest (the largest "
        "batch whose cache fits, and its throughput). Under torchrun --nproc_per_node=N the model is divided among N "
        "GPUs, bytes are those of one of them, and the section largest is left out.",
        epilog=f"modes:\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--model", default="llama-3-8b", help=f"{', '.join(PRESETS)} (random weights), or a checkpoint"
    )
    p.add_argument("--modes", nargs="+", default=DEFAULT_MODES, metavar="MODE", help="see below")
    p.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    p.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    p.add_argument(
        "--context", nargs="+", type=int, default=[8192],
        help="tokens of the prompt (default 8192); of several, generation and largest take the first",
    )  # fmt: skip
    p.add_argument("--new", nargs="+", type=int, default=[512, 1024, 2048], help="new tokens of a generation")
    p.add_argument(
        "--generation_batch", nargs="+", type=int, help="batches of the generation (default: the first)"
    )
    p.add_argument("--steps", type=int, default=256, help="steps timed (default 256: one of them prunes)")
    p.add_argument("--repeats", type=int, default=3, help="prompts timed for the time to first token")
    p.add_argument("--mlp_tokens", type=int, help="tokens of a prompt that an MLP takes at once")
    p.add_argument("--dtype", default=None, choices=("float16", "bfloat16", "float32"))
    p.add_argument("--device", default=None, help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--commit", help="what the rows call the code (default: as git describes it)")
    p.add_argument("--out", type=Path, default=Path("speed"), help="folder for mem_spd.csv and plots")
    p.add_argument("--json", action="store_true", help="print the rows as JSON lines instead of text")
    p.add_argument("--no_plots", action="store_true")
    p.add_argument("--quick", action="store_true", help="few steps, short generations: a smoke run")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return _run(args)
    except UserError as error:
        print(f"mem_spd_test.py: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch
    from mustafar.parallel import leave

    from ..shared.models import resolve_device
    from . import dense, presets, report
    from .measure import DoesNotFit, bandwidth, generation_rows, largest_row, step_row
    from .ranks import Ranks

    modes = [parse(name) for name in args.modes]
    if args.quick:
        args.steps, args.new, args.repeats = min(args.steps, 32), [min(args.new[0], 32)], 1
    for name in ("steps", "repeats"):
        _positive(name, getattr(args, name))
    for name in ("context", "batch", "new", "generation_batch"):
        for value in getattr(args, name) or []:
            _positive(name, value)
    marks = sorted(set(args.new))
    if marks[0] < 2:
        raise UserError("--new: at least 2, for a speed to be measured")
    ranks = Ranks.of_environment()
    device = torch.device(ranks.device(resolve_device(args.device)))
    dtype = args.dtype or ("float16" if device.type == "cuda" else "float32")
    if device.type == "cuda" and dtype == "float32":
        raise UserError("--dtype float32: the GPU kernels take float16 and bfloat16")
    if "largest" in args.sections and (device.type != "cuda" or ranks.count > 1):
        # Ranks that ran out of memory at different batches would wait for one another.
        args.sections = [section for section in args.sections if section != "largest"]
    if any(mode.fixed for mode in modes):
        dense.check_cudnn(device, dtype, 128)
    args.out.mkdir(parents=True, exist_ok=True)

    speaks = ranks.number == 0
    say = _silent if args.json or not speaks else _say
    ranks.connect(str(device))
    model = presets.load(args.model, dtype, str(device), ranks)
    speed = bandwidth(device)
    about = {"model": args.model, "ranks": ranks.count} | report.machine(device, dtype)
    if args.commit:
        about["commit"] = args.commit
    say(f"{args.model}, {dtype}, {ranks.count} x {about['device']}, copies at {speed / 1e12:.3f} TB/s")
    rows: list[report.Row] = []

    def add(row: report.Row) -> None:
        rows.append(about | row)
        if not speaks:
            return
        report.write_csv(rows, args.out / "mem_spd.csv")  # a run that is stopped leaves what it has
        print(json.dumps(rows[-1]) if args.json else f"  {report.line(rows[-1])}", flush=True)

    def attempt(section: str, mode: Mode, batch: int, context: int, measure: Callable[..., list[report.Row]]):
        where = {"section": section, "mode": mode.name, "batch": batch, "context": context}
        try:
            for row in measure():
                add(row)
        except DoesNotFit as error:
            note = f"does not fit the memory of {about['device']}"
            if error.largest is not None:
                note += f": the cache of at most a batch of {error.largest} does, prompts not counted"
            add(where | {"note": note})
        except (RuntimeError, NotImplementedError, TypeError) as error:  # others go on
            note = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            add(where | {"note": note})

    def progress(text: str) -> None:
        say(f"    {text}")

    first = args.context[0]
    if "steps" in args.sections:
        say("decode steps on a filled cache")
        for context, batch, mode in itertools.product(args.context, args.batch, modes):
            call = functools.partial(step_row, model, mode, batch, context, args.steps, speed)
            attempt("steps", mode, batch, context, lambda: [call()])  # noqa: B023
        say(report.comparison(rows))
    if "generation" in args.sections:
        say("whole generations")
        for batch, mode in itertools.product(args.generation_batch or args.batch[:1], modes):
            if mode.fixed:
                say(f"  {mode.name} decodes no text, its steps are all of one length: left out")
                continue
            call = functools.partial(
                generation_rows, model, mode, batch, first, marks, args.repeats, args.mlp_tokens, progress
            )
            attempt("generation", mode, batch, first, call)
    if "largest" in args.sections:
        say("largest batches")
        for mode in modes:
            if mode.loop == "decoder":
                steps = min(args.steps, 64)
                call = functools.partial(largest_row, model, mode, first, steps, speed, progress)
                attempt("largest", mode, 0, first, lambda: [call()])  # noqa: B023
    if ranks.count > 1:
        leave()
    if not args.no_plots and speaks:
        try:
            say(
                "written: "
                + ", ".join(str(path) for path in [args.out / "mem_spd.csv", *report.draw(rows, args.out)])
            )
        except ModuleNotFoundError:
            say("no plots: matplotlib is not installed")
    failed = [row for row in rows if str(row.get("note", "")).startswith("failed")]
    return 1 if failed else 0


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"--{name}: expected at least 1, got {value}")


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}" if not text.startswith(" ") else text, flush=True)


def _silent(text: str) -> None:
    pass
