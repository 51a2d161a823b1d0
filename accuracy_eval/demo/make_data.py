"""Write the demo's data: tasks.json and one JSON-lines file per task, any number of rows of any length.

`python accuracy_eval/demo/make_data.py` writes the bundled files again, byte for byte;
`--rows 500 --tokens 4096 --seed 1 --out DIR` makes a larger set.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from demo.tasks import MAX_TOKENS, TASKS, VOCABULARY, Rng, make  # noqa: E402
from demo.words import EOS, LABELS, to_text  # noqa: E402

# What is bundled: lengths go round in this order, so that any leading part has all of them.
TASK_NAMES = ("homes", "employers", "topics", "paragraphs")
ROWS = 24
TOKENS = (1024, 4096, 2048)
SEED = 2025
DENSITY = 0.45
LINE = 4  # sentences of a line of the context, for the eye: white space is no token


def tasks_json() -> dict[str, dict]:
    """How each task is asked and scored, as the prediction pipeline reads it."""
    return {
        name: {
            "prompt": task.prompt,
            "max_new_tokens": task.max_new_tokens,
            "metric": task.metric,
            "chat": False,
            "first_line": False,
        }
        for name, task in TASKS.items()
    }


def make_row(name: str, seed: int, index: int, tokens: int, density: float) -> dict:
    """Make one row in LongBench's format, a function of the arguments alone.

    Parameters
    ----------
    name : str
        A key of `TASKS`.
    tokens : int
        Most tokens of prompt and answer together, 64 to 4096.
    density : float
        Share of the sentences that are facts, in (0, 1].

    Returns
    -------
    dict
        input, context, answers, length (words), dataset, language, all_classes, _id

    Raises
    ------
    ValueError
        For an unknown task, or tokens or density out of range.
    """
    if name not in TASKS:
        raise ValueError(f"unknown demo task {name!r}: choose from {', '.join(TASKS)}")
    if not 64 <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens: expected 64 to {MAX_TOKENS}, got {tokens}")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a share of the sentences in (0, 1], got {density}")
    task = TASKS[name]
    overhead = 1 + sum(len(part.split()) for part in (task.head, task.question, task.answer))
    key = hashlib.sha256(f"{name}/{seed}/{index}/{tokens}/{density}".encode()).hexdigest()
    rng = Rng(seed=int(key[:15], 16))
    drawn = make(rng, name, 1, (tokens - overhead) // 8, 1, (density, density))
    sentences, question, answer = (
        [[VOCABULARY[i] for i in row] for row in part[0].tolist()] for part in drawn
    )
    lines = [sentences[i : i + LINE] for i in range(0, len(sentences), LINE)]
    context = "\n".join(" ".join(to_text(sentence) for sentence in line) for line in lines)
    asked = task.prompt.split("{input}")[0].split("\n")[-1]  # "Question: ", already in the template
    question = to_text(question[0]).removeprefix(asked).removesuffix(" Answer:")
    said = [word for word in answer[0] if word != EOS]
    return {
        "input": question,
        "context": context,
        "answers": [to_text(said[1:] if said[0] == "the" else said)],
        "length": len(context.split()),
        "dataset": name,
        "language": "en",
        # All labels there are: LongBench scores a whole file with the classes of its last row.
        "all_classes": [f"{label} group" for label in LABELS] if name == "topics" else None,
        "_id": key[:48],
    }


def make_rows(name: str, count: int, tokens: tuple[int, ...], seed: int, density: float) -> list[dict]:
    """`count` rows of a task, whose lengths go round in `tokens`."""
    return [make_row(name, seed, i, tokens[i % len(tokens)], density) for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows per task")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="prompt and answer, at most")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--density", type=float, default=DENSITY, help="share of the context that facts fill")
    parser.add_argument("--tasks", nargs="+", default=TASK_NAMES, choices=list(TASKS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        rows = make_rows(name, args.rows, tuple(args.tokens), args.seed, args.density)
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")
    chosen = {name: entry for name, entry in tasks_json().items() if name in args.tasks}
    (args.out / "tasks.json").write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
