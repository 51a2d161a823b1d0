"""All eight pruning rules on the bundled model: what the kernels answer is what the simulated cache answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.longbench import predict, settings
from demo.make_data import TASK_NAMES, make_rows, tasks_json
from longbench_helpers import ACCURACY_EVAL, read_jsonl, write_jsonl

pytest.importorskip("mustafar")
pytestmark = pytest.mark.usefixtures("one_thread")
SPARSITY = "0.7"


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    """predictions(k_rule, v_rule, backend) -> task -> answers to three prompts of 700 tokens, left-padded."""
    root, memory = tmp_path_factory.mktemp("demo"), {}
    for name in TASK_NAMES:
        write_jsonl(root / f"rows/{name}.jsonl", make_rows(name, 3, (700, 650), 11, 0.45))
    (root / "rows/tasks.json").write_text(json.dumps({n: tasks_json()[n] for n in TASK_NAMES}))

    def run(k_rule, v_rule, backend):
        rules = ["--k_rule", k_rule, "--v_rule", v_rule, "--backend", backend, "--batch_size", "3"]
        fixed = ["--device", "cpu", "--data_dir", str(root / "rows"), "--output_dir", str(root)]
        arguments = [SPARSITY, SPARSITY, str(ACCURACY_EVAL / "demo/demo-llama"), "mustafar", *rules, *fixed]
        folder = predict.predict(settings.parse(arguments), memory)
        return {name: [row["pred"] for row in read_jsonl(folder / f"{name}.jsonl")] for name in TASK_NAMES}

    return run


@pytest.mark.parametrize(
    "rules",
    [
        ("Kt_Mag", "Vt_Mag"),
        ("Kt_Opt", "Vt_Opt"),
        ("ThinK", "ThinV"),
        ("Kt_Opt", "Vc_Opt"),
        ("ThinK", "Vc_Mag"),
    ],
    ids="+".join,
)
def test_kernels_answer_as_the_simulated_cache(predictions, rules):
    found = predictions(*rules, "kernel")
    assert all(len(answers) == 3 and all(answers) for answers in found.values())
    assert found == predictions(*rules, "simulate")
