"""The command line behind `analyze.py`: one prefill, measured layer by layer, to CSV, JSON and plots."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path

from ..shared import models
from ..shared.errors import UserError
from ..shared.options import DTYPES, at_least, sparsity
from ..shared.run import command, environment
from ..shared.store import replace_file

_EPILOG = """It writes to DIR: magnitudes.csv and .png (|K| and |V| by channel), pattern.png (what rules keep),
errors.csv and .png (||O' - O|| / ||O|| of each layer's attention output O, the layer's input being the dense
model's), summary.json. Errors are of the prompt's last 32 queries, which the rules do not see: tokens are
pruned as if the prompt ended before them."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (2 after a message about what to put right)."""
    parser = argparse.ArgumentParser(
        prog="analyze.py",
        description="Measure a prompt's keys and values, and what pruning them does in each layer.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a local folder or a hub id")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--file", type=Path, help="the prompt is the text of this file")
    prompt.add_argument("--text", help="the prompt")
    parser.add_argument("--max_length", type=at_least(1), help="use the first tokens only")
    parser.add_argument("--k_rules", nargs="*", default=["Kt_Mag", "Kt_Opt", "ThinK"], metavar="RULE")
    parser.add_argument(
        "--v_rules", nargs="*", default=["Vt_Mag", "Vc_Mag", "Vc_Opt", "ThinV"], metavar="RULE"
    )
    parser.add_argument("--sparsities", nargs="+", type=sparsity, default=[0.5, 0.7], metavar="S")
    parser.add_argument("--residual_length", type=at_least(0), default=32, help="dense window (32)")
    parser.add_argument("--group_size", type=at_least(1), default=32, help="of channel-wise rules (32)")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=at_least(0),
        metavar="N",
        help="layers to draw (the first, middle and last)",
    )
    parser.add_argument("--head", type=at_least(0), default=0, help="KV head to draw (0)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: the checkpoint's on a GPU, float32 on a CPU"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu or auto")
    parser.add_argument("--output", type=Path, default=Path("analysis"), metavar="DIR", help="%(default)s")
    args = parser.parse_args(argv)
    return command(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from . import capture, measure, plots

    _check_rules(args)
    text = _read(args.file) if args.file else args.text
    info = models.inspect_model(args.model)
    config = info.config.get_text_config()
    drawn = _layers_to_draw(args.layers, config.num_hidden_layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if args.head >= heads:
        raise UserError(f"--head {args.head}: {info.name} has {heads} KV heads, 0 to {heads - 1}")
    ids = _encode(info, text, args)

    device = models.resolve_device(args.device)
    dtype = models.resolve_dtype(info, args.dtype, device)
    model = capture.load(info, dtype, device)
    cases = measure.cases(args.k_rules, args.v_rules, args.sparsities)
    errors: dict[measure.Case, list[float]] = {case: [] for case in cases}
    found: dict[int, tuple[measure.Magnitudes, measure.Magnitudes]] = {}
    shown: dict[int, dict] = {}

    with tqdm(total=config.num_hidden_layers, desc="layers") as progress:

        def take(layer: capture.Layer) -> None:
            found[layer.index] = measure.magnitudes(layer.keys), measure.magnitudes(layer.values)
            pruned = measure.PrunedLayer(layer, args.residual_length, args.group_size)
            for case in cases:
                errors[case].append(pruned.error(case))
            if layer.index in drawn[len(drawn) // 2 :][:1]:
                shown[layer.index] = _patterns(pruned, args)
            progress.update()

        try:
            capture.prefill(model, ids, measure.HELD_OUT + measure.OBSERVED_QUERIES, take)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory; lower --max_length or use a larger GPU\n{error}") from None

    title = f"{info.name}, {len(ids)} tokens"
    summary = {
        "model": info.path, "tokens": len(ids), "dtype": dtype, "device": device, "held_out": measure.HELD_OUT,
        "residual_length": args.residual_length, "group_size": args.group_size, "environment": environment(),
        "peak": {str(i): {"K": k.peak(), "V": v.peak()} for i, (k, v) in found.items()},
        "mean_error": [{**vars(case), "error": sum(values) / len(values)} for case, values in errors.items()],
    }  # fmt: skip
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        replace_file(args.output / "summary.json", json.dumps(summary, indent=2) + "\n")
        replace_file(args.output / "magnitudes.csv", _magnitudes_csv(found, measure.QUANTILES))
        replace_file(args.output / "errors.csv", _errors_csv(errors, list(found)))
        plots.by_channel({i: found[i] for i in drawn}, args.head, title, args.output / "magnitudes.png")
        for index, panels in shown.items():
            where = (
                f"{title}: layer {index}, KV head {args.head}, the last {plots.TOKENS_SHOWN} pruned tokens"
            )
            plots.patterns(panels, where, args.output / "pattern.png")
        heading = f"{title}: error of each layer's attention output"
        if errors:
            plots.errors(errors, list(found), heading, args.output / "errors.png")
    except OSError as error:
        raise UserError(f"cannot write to {args.output} ({error.strerror}); give another --output") from None
    _print(summary)
    print(f"written to {args.output}")


def _check_rules(args: argparse.Namespace) -> None:
    from mustafar.pruning import get_rule

    try:
        for tensor, rules in (("K", args.k_rules), ("V", args.v_rules)):
            for rule in rules:
                get_rule(rule, tensor)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not (args.k_rules or args.v_rules):
        raise UserError("nothing to prune: --k_rules and --v_rules are both empty")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read --file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--file {path} is not UTF-8 text") from None


def _layers_to_draw(given: list[int] | None, count: int) -> list[int]:
    if given is None:
        return sorted({0, count // 2, count - 1})
    if max(given) >= count:
        raise UserError(f"--layers {max(given)}: the model has {count} layers, 0 to {count - 1}")
    return sorted(set(given))


def _encode(info: models.ModelInfo, text: str, args: argparse.Namespace) -> list[int]:
    from . import measure

    ids = info.tokenizer(text).input_ids[: args.max_length]
    least = args.residual_length + measure.HELD_OUT + 32
    if len(ids) < least:
        raise UserError(
            f"the prompt has {len(ids)} tokens; an analysis takes at least {least}: {measure.HELD_OUT} whose "
            f"queries are measured on, {args.residual_length} for the dense window, and some to prune"
        )
    limit = models.position_limit(info)
    if limit and len(ids) > limit:
        raise UserError(
            f"the prompt has {len(ids)} tokens and {info.name} takes {limit}; give --max_length {limit}"
        )
    return ids


def _patterns(pruned, args: argparse.Namespace) -> dict[str, list]:
    """K or V -> what each rule keeps at the first sparsity, of the last tokens that are pruned, after all of them."""
    from . import plots

    rows = slice(max(0, pruned.pruned - plots.TOKENS_SHOWN), pruned.pruned)

    def of(x):
        return x[args.head, rows].float().abs().cpu().numpy()

    panels = {}
    for tensor, rules in (("K", args.k_rules), ("V", args.v_rules)):
        if rules:
            dense = pruned.layer.keys if tensor == "K" else pruned.layer.values
            kept = [
                (f"{rule} {args.sparsities[0]:g}", of(pruned.pattern(rule, args.sparsities[0])))
                for rule in rules
            ]
            panels[tensor] = [(f"{tensor}, dense", of(dense)), *kept]
    return panels


def _magnitudes_csv(found: dict, quantiles: tuple[float, ...]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["layer", "tensor", "head", "channel", "mean", *(f"quantile_{q:g}" for q in quantiles)])
    for layer, pair in found.items():
        for tensor, one in zip("KV", pair, strict=True):
            for head, channel in ((h, c) for h in range(one.mean.shape[0]) for c in range(one.mean.shape[1])):
                values = [one.mean[head, channel], *one.quantiles[:, head, channel]]
                writer.writerow([layer, tensor, head, channel, *(f"{float(value):.6g}" for value in values)])
    return out.getvalue()


def _errors_csv(errors: dict, layers: list[int]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["layer", "k_rule", "k_sparsity", "v_rule", "v_sparsity", "relative_error"])
    for case, values in errors.items():
        for layer, value in zip(layers, values, strict=True):
            writer.writerow([layer, *vars(case).values(), f"{value:.6g}"])
    return out.getvalue()


def _print(summary: dict) -> None:
    from ..shared.scores import print_table

    lines = [("pruned", "sparsity", "mean error of the layers")]
    for entry in summary["mean_error"]:
        rules = " + ".join(rule for rule in (entry["k_rule"], entry["v_rule"]) if rule)
        lines.append(
            (rules, f"{entry['k_sparsity'] or entry['v_sparsity']:g}", f"{100 * entry['error']:.2f} %")
        )
    print_table(lines, left=1)
