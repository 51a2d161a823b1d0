"""Sweeps: plans, and a table's runs predicted, resumed after a kill, refused."""

from __future__ import annotations

import csv
import json
import re

import pytest
from benchmarks.shared.errors import UserError
from benchmarks.shared.generation import Generator
from benchmarks.sweep import command
from benchmarks.sweep.plan import read_plan
from longbench_helpers import ACCURACY_EVAL, make_model, make_rows, read_jsonl, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = """
options: {batch_size: 2, residual_length: 8}
rows:
  - {name: Dense}
  - {name: ThinK0.5, k_sparsity: 0.5, k_rule: ThinK}
  - {name: K0.5 V0.7, k_sparsity: 0.5, v_sparsity: 0.7}
"""
TASK = {"prompt": "{context} {input}", "max_new_tokens": 4, "metric": "qa_f1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def sweep(model, tmp_path, capsys):
    """Run a sweep in this process: sweep(..., out="out") -> (status, stdout, stderr)."""
    data = tmp_path / "data"
    for name in ("one", "two"):
        write_jsonl(data / f"{name}.jsonl", make_rows(5, words=60))
    (data / "tasks.json").write_text(json.dumps({"one": TASK, "two": TASK}))
    (tmp_path / "plan.yaml").write_text(PLAN)

    def run(*options: str, out: str = "out"):
        fixed = ["--model", str(model), "--data_dir", str(data), "--output_dir", str(tmp_path / out)]
        status = command.main([str(tmp_path / "plan.yaml"), *fixed, "--device", "cpu", *options])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def predictions(folder) -> dict[str, list[dict]]:
    return {str(path.relative_to(folder)): read_jsonl(path) for path in sorted(folder.rglob("*.jsonl"))}


def test_a_sweep_killed_at_any_point_loses_and_doubles_no_row(sweep, tmp_path, monkeypatch):
    status, printed, err = sweep(out="whole")
    assert status == 0, err
    whole = predictions(tmp_path / "whole/pred")
    assert len(whole) == 6 and all([r["_index"] for r in rows] == list(range(5)) for rows in whole.values())

    predict, calls = Generator.predict, 0

    def killed(self, task, rows):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise KeyboardInterrupt
        return predict(self, task, rows)

    monkeypatch.setattr(Generator, "predict", killed)
    stops = 0
    while (status := sweep()[0]) == 130:
        stops += 1
        # What a kill during a write leaves: the front part of a line.
        newest = max((tmp_path / "out/pred").rglob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        with newest.open("a") as file:
            file.write('{"pred": "w1 w2", "answ')
    assert (status, stops) == (0, 5)  # 18 batches, three between two kills
    assert predictions(tmp_path / "out/pred") == whole

    monkeypatch.setattr(Generator, "__init__", lambda *_: pytest.fail("a finished sweep loads no model"))
    status, again, err = sweep()
    assert status == 0, err
    table, found = (text[text.index("# tiny") : text.rindex("report of")] for text in (printed, again))
    assert table == found

    with (tmp_path / "out/report/plan_tiny/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["configuration"] for row in rows if row["name"] == "Average"] == [
        "Dense",
        "ThinK0.5",
        "K0.5 V0.7",
    ]
    shares = {row["configuration"]: float(row["kv_share"]) for row in rows}
    records = [record["_kv_bytes"] for name, rows in whole.items() if "V_0.7" in name for record in rows]
    assert shares["K0.5 V0.7"] == pytest.approx(
        sum(held for held, _ in records) / sum(dense for _, dense in records), abs=1e-4
    )
    assert shares["Dense"] == 1


def test_a_folder_of_another_configuration_is_refused(sweep, tmp_path):
    assert sweep("--rows", "Dense")[0] == 0
    write_jsonl(tmp_path / "data/two.jsonl", make_rows(5, seed=1))
    status, _, err = sweep("--rows", "Dense")
    assert status == 2 and "two.sha256: there" in err and "remove that folder" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", "Dense", "K0.9"), "--rows K0.9: not in"),
        (("--k_rule", "ThinK"), "--k_rule cannot be given to a sweep"),
        (("--e",), "--e cannot be given to a sweep"),
        (("--published", "none.yaml"), "cannot read none.yaml"),
    ],
)
def test_bad_options(sweep, options, message):
    status, _, err = sweep(*options)
    assert status == 2 and message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is no plan"),
        ("rows: [", "not valid YAML"),
        ("rows: []", "rows must be a list"),
        ("benchmark: mmlu\nrows: [{name: a}]", "benchmark 'mmlu' is not known; valid ones: longbench, ruler"),
        ("row: 1\nrows: [{name: a}]", "unknown key row; valid ones: benchmark, options, rows"),
        ("rows: [{name: a}, {name: a, k_sparsity: 0.5}]", "row 2: the name 'a' is there twice"),
        ("rows: [{name: a, k_sparsity: 0.5}, {name: b, k_sparsity: 0.5}]", "'b' is the configuration of 'a'"),
        ("rows: [{name: a, k_sparsity: 1.5}]", "row 1 (a): k_sparsity must be in [0, 1), got 1.5"),
        ("rows: [{name: a, k_sparsity: high}]", "k_sparsity must be in [0, 1), got 'high'"),
        ("rows: [{name: a, k_rule: ThinK}]", "k_rule does nothing without k_sparsity"),
        ("rows: [{name: a, sparsity: 0.5}]", "unknown key sparsity"),
        ("rows: [{k_sparsity: 0.5}]", "row 1: it needs a name"),
        ("rows: [Dense]", "row 1: expected {name: ..., k_sparsity: ...}, got 'Dense'"),
        ("options: [1]\nrows: [{name: a}]", "options must be a map"),
    ],
)
def test_bad_plans(tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_plan(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_an_unknown_rule_is_told_before_the_first_run(sweep, tmp_path):
    (tmp_path / "plan.yaml").write_text("rows: [{name: Dense}, {name: a, k_sparsity: 0.5, k_rule: Kt_Max}]")
    status, printed, err = sweep()
    assert status == 2 and "Kt_Max" in err and "Kt_Mag" in err and "Dense" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", sorted((ACCURACY_EVAL / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_bundled_plans(path):
    plan = read_plan(path)
    assert plan.rows[0].is_dense and len(plan.rows) >= 3


def test_the_papers_rows():
    names = [row.name for row in read_plan(ACCURACY_EVAL / "sweeps/paper.yaml").rows]
    assert {"Dense", "ThinK0.5", "ThinK0.7", "K0.5", "K0.7", "V0.5", "V0.7", "K0.5 V0.5", "K0.7 V0.7"} <= set(
        names
    )


@pytest.mark.parametrize("results", ["h200", "h200_stores"])
def test_the_kept_results_are_those_of_the_bundled_plan(results):
    with (ACCURACY_EVAL / "demo/results" / results / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows = {row.name: row for row in read_plan(ACCURACY_EVAL / "sweeps/bundled.yaml").rows}
    assert list(dict.fromkeys(line["configuration"] for line in lines)) == list(rows)
    for line in lines:
        row = rows[line["configuration"]]
        assert (float(line["k_sparsity"]), float(line["v_sparsity"])) == (row.k_sparsity, row.v_sparsity)
        assert row.is_dense or (line["k_rule"], line["v_rule"]) == (row.k_rule, row.v_rule)
        assert line["kind"] != "data set" or int(line["rows"]) >= 500


def kept_results(results: str = "h200") -> dict[str, dict[str, dict[str, str]]]:
    """Configuration -> data set, or Average -> the line of table.csv."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    with (ACCURACY_EVAL / "demo/results" / results / "table.csv").open() as file:
        for line in csv.DictReader(file):
            found.setdefault(line["configuration"], {})[line["name"]] = line
    return found


@pytest.mark.parametrize(("readme", "fewest"), [("../README.md", 10), ("demo/README.md", 21)])
def test_the_readmes_show_the_kept_results(readme, fewest):
    kept, seen = kept_results(), 0
    for text in (ACCURACY_EVAL / readme).read_text().splitlines():
        label, share, *cells = [cell.strip() for cell in text.strip("|").split("|")] + [""]
        lines = kept.get(label, {})
        if not lines or not share.endswith(" %"):
            continue
        seen += 1
        average = lines["Average"]
        numbers = [float(number) for number in re.findall(r"[-+]?[0-9.]+", " ".join([share, *cells]))]
        expected = [100 * float(average["kv_share"])]
        expected += [
            float(line["score"]) for name, line in lines.items() if len(cells) > 4 or name == "Average"
        ]
        keys = ("difference", "difference_low", "difference_high", "as_dense")
        expected += [float(average[key]) for key in keys if average[key]]
        assert numbers == pytest.approx(expected, abs=0.0501), text
    assert seen >= fewest


def test_the_kept_results_carry_gpu_versions_and_date():
    for results in ("h200", "h200_stores"):
        table = (ACCURACY_EVAL / "demo/results" / results / "table.md").read_text()
        pattern = (
            r"Predicted with NVIDIA H200, torch [0-9.]+, transformers [0-9.]+, mustafar [0-9.]+, 20[0-9-]+\."
        )
        assert re.search(pattern, table)


def test_what_the_kept_results_show():
    """As the READMEs say: 0.5 within a point of dense, whole channels below single elements at equal sparsity."""
    average = {label: lines["Average"] for label, lines in kept_results().items()}
    for label in ("K0.5", "V0.5", "K0.5 V0.5", "K0.7", "V0.7", "K0.7 V0.7", "K0.8 V0.8", "K0.9"):
        low, high = (float(average[label][f"difference_{end}"]) for end in ("low", "high"))
        assert -1 < low <= high < 1, label
    for single, channels in (
        ("V0.7", "ThinV0.7"), ("K0.7 V0.7", "ThinK0.7 ThinV0.7"), ("K0.9", "ThinK0.9"), ("V0.9", "ThinV0.9"),
    ):  # fmt: skip
        assert float(average[channels]["difference_high"]) < float(average[single]["difference_low"])
        assert float(average[channels]["high"]) < float(average[single]["low"])
