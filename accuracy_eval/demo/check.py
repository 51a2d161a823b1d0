"""Greedy answers from a cache pruned by magnitude, simulated in a few lines of plain PyTorch.

It shares no code with the package on purpose: a second opinion on the trained model, usable before anything
is built. `python accuracy_eval/demo/check.py` scores the bundled model on the bundled data by exact match.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

HERE = Path(__file__).resolve().parent
LOCAL_WINDOW = 32  # the latest tokens of the prompt stay dense
SETTINGS = {  # name -> sparsity of K, of V
    "dense": (0.0, 0.0),
    "K0.5": (0.5, 0.0),
    "V0.5": (0.0, 0.5),
    "K0.5V0.5": (0.5, 0.5),
    "K0.7": (0.7, 0.0),
    "V0.7": (0.0, 0.7),
    "K0.7V0.7": (0.7, 0.7),
    "K0.8V0.8": (0.8, 0.8),
    "K0.9V0.9": (0.9, 0.9),
}


def prune(x: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Zero the smallest magnitudes of each token of x [..., T, D], all but the last LOCAL_WINDOW tokens."""
    kept = x.shape[-1] - int(sparsity * x.shape[-1])
    old = x[..., :-LOCAL_WINDOW, :]
    top = old.abs().topk(kept, dim=-1).indices
    return torch.cat(
        [torch.zeros_like(old).scatter(-1, top, old.gather(-1, top)), x[..., -LOCAL_WINDOW:, :]], -2
    )


@torch.inference_mode()
def answers(
    model: PreTrainedModel, prompt: list[int], settings: list[tuple[float, float]], max_new_tokens: int
) -> list[list[int]]:
    """Prefill once, then decode greedily from one pruned copy of the cache per setting, as one batch."""
    ids = torch.tensor([prompt], device=model.device)
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    for layer in cache.layers:
        layer.keys = torch.cat([prune(layer.keys, k) for k, _ in settings])
        layer.values = torch.cat([prune(layer.values, v) for _, v in settings])
    token = logits[:, -1].argmax(-1, keepdim=True).expand(len(settings), 1)
    tokens = [token]
    end = model.config.eos_token_id
    ended = token == end
    while len(tokens) < max_new_tokens and not ended.all():
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        ended |= token == end
    rows = torch.cat(tokens, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def is_right(text: str, row: dict) -> bool:
    """Whether the text is the whole answer, up to an opening article and a final mark."""
    return text.strip().removeprefix("the ").rstrip(".") in row["answers"]


def exact_match(
    model: PreTrainedModel, tokenizer, tasks: dict, rows: list[dict]
) -> dict[str, dict[str, float]]:
    """Percentage of rows answered exactly: task -> setting -> score."""
    right: dict[str, dict[str, list[bool]]] = {}
    for row in tqdm(rows, unit="row"):
        task = tasks[row["dataset"]]
        prompt = tokenizer(task["prompt"].format(**row)).input_ids
        said = answers(model, prompt, list(SETTINGS.values()), task["max_new_tokens"])
        scores = right.setdefault(row["dataset"], {name: [] for name in SETTINGS})
        for name, ids in zip(SETTINGS, said, strict=True):
            scores[name].append(is_right(tokenizer.decode(ids, skip_special_tokens=True), row))
    return {t: {s: 100 * sum(v) / len(v) for s, v in scores.items()} for t, scores in right.items()}


def show(scores: dict[str, dict[str, float]]) -> None:
    """Print the scores as a table."""
    width = max(len(name) for name in (*scores, "average")) + 2
    print(" " * width + "".join(f"{name:>10}" for name in SETTINGS))
    average = {s: sum(scores[t][s] for t in scores) / len(scores) for s in SETTINGS}
    for name, row in {**scores, "average": average}.items():
        print(f"{name:<{width}}" + "".join(f"{row[s]:10.1f}" for s in SETTINGS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "demo-llama")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--limit", type=int, default=None, help="rows per task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tasks = json.loads((args.data / "tasks.json").read_text())
    rows = []
    for name in tasks:
        lines = (args.data / f"{name}.jsonl").read_text().split("\n")
        rows += [json.loads(line) for line in lines if line][: args.limit]
    start = time.perf_counter()
    show(exact_match(model, tokenizer, tasks, rows))
    print(
        f"exact match in %, {len(rows)} rows, {time.perf_counter() - start:.0f} s, {dtype} on {args.device}"
    )


if __name__ == "__main__":
    sys.exit(main())
