"""Scores against the official scorer itself, run as it is on prediction files full of its special cases.

LongBench's `eval.py` and `metrics.py` are not bundled. Put both into a folder and name it:
`MUSTAFAR_LONGBENCH=/path/to/LongBench pytest accuracy_eval/tests/test_longbench_official.py`.
MUSTAFAR_LONGBENCH_ROWS (60) is the number of rows of each data set.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.longbench import evaluate
from benchmarks.longbench.tasks import LONGBENCH_E, NAMES, longbench_tasks
from longbench_helpers import write_jsonl

OFFICIAL = Path(os.environ.get("MUSTAFAR_LONGBENCH", "/nowhere"))
ROWS = int(os.environ.get("MUSTAFAR_LONGBENCH_ROWS", "60"))
TASKS = longbench_tasks()
# Pieces of which predictions and truths are put together, so that they meet in part.
ENGLISH = (
    "the The a an cat Cat, dog dogs. 1999 12 012 7 red-car it's (no) yes \u2018quoted\u2019 caf\u00e9 . \u2014 ; "
    "sat. ran. and of Paragraph Paragraph 7 \u0663 \u00b2 # // ` return x = 1 def f(): \n \n\n \t \u2028"
).split(" ")
CHINESE = (
    "我 喜欢 苹果 香蕉 。 \uff0c 会议 讨论了 预算 计划 厦门大学 举办 段落7 段落 12 A股 "
    "《 》 \uff01 体育 财经 \n \u3000 the 3.5"
).split(" ")
CLASSES = {
    "trec": ["Number", "Date", "Number of days", "Other number", "City", "Other location"],
    "lsht": ["体育", "财经", "体育财经", "社会"],
}


def text(rng: random.Random, name: str, most: int) -> str:
    pieces = CHINESE if TASKS[name].metric.endswith("_zh") or name == "lsht" else ENGLISH
    pieces = [*pieces, *CLASSES.get(name, ())]
    return rng.choice(("", " ")).join(rng.choice(pieces) for _ in range(rng.randint(0, most)))


def truth(rng: random.Random, name: str) -> str:
    if name in CLASSES:
        return rng.choice(CLASSES[name])
    if name.startswith("passage_retrieval"):
        return ("段落" if name.endswith("zh") else "Paragraph ") + str(rng.choice((7, 12)))
    return rng.choice(("7", "12")) if name == "passage_count" else text(rng, name, 12)


def rows(name: str) -> list[dict]:
    """Predictions that repeat the truth, hold it, share words with it, or have nothing of it."""
    rng = random.Random(name)
    found = []
    for _ in range(ROWS):
        answers = [truth(rng, name) for _ in range(rng.randint(1, 3))]
        parts = [text(rng, name, 8), rng.choice((*answers, text(rng, name, 12))), text(rng, name, 8)]
        pred = rng.choice((parts[1], "".join(parts), "\n" + "\n".join(parts), ""))
        length = rng.choice((10, 3999, 4000, 7999, 8000, 30_000))
        found.append({"pred": pred, "answers": answers, "all_classes": CLASSES.get(name), "length": length})
    return found


@pytest.mark.skipif(
    not (OFFICIAL / "eval.py").is_file(), reason="MUSTAFAR_LONGBENCH names no folder with eval.py"
)
@pytest.mark.parametrize("by_length", [False, True], ids=["longbench", "longbench-e"])
def test_equal_to_the_official_scorer(tmp_path, by_length):
    option, folder = (["--e"], "pred_e/run") if by_length else ([], "pred/run")
    for name in LONGBENCH_E if by_length else NAMES:
        write_jsonl(tmp_path / folder / f"{name}.jsonl", rows(name))
    result = tmp_path / folder / "result.json"
    command = [sys.executable, str(OFFICIAL.resolve() / "eval.py"), "--model", "run", *option]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    official = json.loads(result.read_text())
    result.unlink()
    assert evaluate.main(["--model", "run", "--output_dir", str(tmp_path), *option]) == 0
    ours = json.loads(result.read_text())
    assert ours == official
    values = [v for score in ours.values() for v in (score.values() if by_length else [score])]
    assert len(values) == (39 if by_length else 21) and not any(map(math.isnan, values))
    assert sum(5 < value < 95 for value in values) > 0.8 * len(values)  # neither trivially right nor wrong
