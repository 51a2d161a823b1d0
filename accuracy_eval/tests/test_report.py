"""Reports: intervals and averages against numbers worked out by hand, and the runs they refuse to mix."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest
from benchmarks.report import command, intervals, plots
from benchmarks.report.runs import Run, read_run
from benchmarks.report.write import make_report, title_of, write_report
from longbench_helpers import write_jsonl
from matplotlib.text import Text

CONFIG = {
    "benchmark": "longbench", "model": "/models/tiny", "model_fingerprint": "f", "max_length": 512,
    "mode": "mustafar", "k_sparsity": 0.5, "v_sparsity": 0.0, "group_size": 32, "k_rule": "Kt_Mag",
    "v_rule": "Vt_Mag", "residual_length": 32, "backend": "kernel", "chat_template": "none", "dtype": "float32",
    "device": "cpu", "batch_size": 1,
}  # fmt: skip
DENSE = {
    "mode": "dense", "k_sparsity": 0.0, "k_rule": None, "v_rule": None, "residual_length": None, "backend": None,
}  # fmt: skip


def make_run(folder, right: dict[str, list[bool]], *, kv_bytes=(30, 40), drop=0, sha256="s", **config):
    """Write a run whose rows of QA sets are right or wrong as told; `drop` leaves the last rows out."""
    folder.mkdir()
    datasets = {}
    for name, rows in right.items():
        records = [
            {
                "pred": "yes" if ok else "no",
                "answers": ["yes"],
                "all_classes": None,
                "length": 1,
                "_index": index,
            }
            | ({} if config.get("mode") == "dense" else {"_kv_bytes": list(kv_bytes)})
            for index, ok in enumerate(rows)
        ]
        write_jsonl(folder / f"{name}.jsonl", records[: len(rows) - drop])
        datasets[name] = {"rows": 200, "expected": len(rows), "sha256": sha256, "task": {}}
    (folder / "config.json").write_text(json.dumps(CONFIG | config | {"datasets": datasets}))
    return folder


def bits(text: str) -> list[bool]:
    return [letter == "1" for letter in text]


@pytest.fixture
def two(tmp_path):
    """A dense and a pruned run. Means in percent: 100 and 75, 50 and 25, 75 and 75, in two groups of the paper."""
    names = ("narrativeqa", "qasper", "hotpotqa")
    dense = make_run(
        tmp_path / "a", dict(zip(names, map(bits, ("1111", "1100", "1110")), strict=True)), **DENSE
    )
    pruned = make_run(tmp_path / "b", dict(zip(names, map(bits, ("1101", "1000", "0111")), strict=True)))
    return dense, pruned


def test_averages_are_of_groups_and_of_all_data_sets(two, tmp_path):
    report = make_report(two)
    write_report(report, tmp_path / "out")
    with (tmp_path / "out/table.csv").open() as file:
        rows = {(row["configuration"], row["name"]): row for row in csv.DictReader(file)}
    # Single-Doc QA is of two data sets, Multi-Doc QA of one, the average of the three.
    for label, expected in (("dense", (75.0, 75.0, 75.0)), ("K 0.5 V 0", (50.0, 75.0, 58.33))):
        for name, value in zip(("Single-Doc QA", "Multi-Doc QA", "Average"), expected, strict=True):
            assert float(rows[label, name]["score"]) == value
    assert (
        rows["K 0.5 V 0", "Average"]["difference"] == "-16.67"
        and rows["dense", "Average"]["difference"] == ""
    )
    assert (
        rows["K 0.5 V 0", "qasper"]["kv_share"] == "0.7500"
        and rows["dense", "qasper"]["kv_share"] == "1.0000"
    )
    # Answers equal to the dense run's: 3 of 4, 3 of 4 and 2 of 4, though the last data set's score is the same.
    for name, value in (("qasper", "75.00"), ("hotpotqa", "50.00"), ("Average", "66.67")):
        assert (rows["K 0.5 V 0", name]["as_dense"], rows["dense", name]["as_dense"]) == (value, "")
    table = (tmp_path / "out/table.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    head = ["configuration", "KV bytes", "Single-Doc QA", "Multi-Doc QA", "Average", "difference", "as dense"]
    assert cells[0] == head
    assert cells[2][:5] == ["dense", "100.0 %", "75.00", "75.00", "75.00"]
    assert cells[3][:5] == ["K 0.5 V 0", "75.0 %", "50.00", "75.00", "58.33"]
    assert cells[2][5:] == ["", ""] and cells[3][6].startswith("66.7 [")
    for name in ("accuracy_by_size.png", "by_task.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_the_table_says_what_it_was_predicted_with(tmp_path):
    def run(name, gpu, *dates, **config):
        first, *rest = [{"date": f"{date}T10:00:00+00:00", "torch": "2.11.0", "gpu": gpu} for date in dates]
        environment = first | ({"earlier": rest} if rest else {})
        return make_run(
            tmp_path / name, {"qasper": bits("10")}, environment=environment, device="cuda", **config
        )

    one = [run("a", "GPU 1", "2026-11-20", **DENSE), run("b", "GPU 1", "2026-11-21", "2026-11-18")]
    write_report(make_report(one), tmp_path / "one")
    assert (
        "Predicted with GPU 1, torch 2.11.0, 2026-11-18 to 2026-11-21.\n"
        in (tmp_path / "one/table.md").read_text()
    )
    other = run("c", "GPU 2", "2026-11-22", k_sparsity=0.7)
    write_report(make_report([*one, other]), tmp_path / "two")
    assert "2026-11-21; GPU 2, torch 2.11.0, 2026-11-22.\n" in (tmp_path / "two/table.md").read_text()


@pytest.mark.parametrize("count", [2, 5, 6, 24])
def test_plots_leave_no_text_outside_or_over_another(tmp_path, monkeypatch, count):
    """Long labels, a long name of the model, all families of rules: legends, ticks and titles stay in the picture."""
    rules = list(
        itertools.product(("Kt_Mag", "Kt_Opt", "ThinK", None), ("Vt_Mag", "Vc_Mag", "Vc_Opt", "ThinV", None))
    )
    folders, labels = [make_run(tmp_path / "dense", {"qasper": bits("1101")}, **DENSE)], ["Dense"]
    for number, (k_rule, v_rule) in zip(range(1, count), itertools.cycle(rules[:-1])):
        pruned = {
            "k_rule": k_rule,
            "v_rule": v_rule,
            "k_sparsity": 0.5 if k_rule else 0,
            "v_sparsity": 0.5 if v_rule else 0,
        }
        folders.append(make_run(tmp_path / str(number), {"qasper": bits("1001")}, **pruned))
        labels.append(f"{number}: K and V at 0.5, per channel, output-aware, both")
    figures = []
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: figures.append(figure) or figure.draw_without_rendering()
    )
    report = make_report(folders, labels)
    for draw in (plots.accuracy_by_size, plots.by_task):
        draw(report, "Meta-Llama-3.1-70B-Instruct-of-a-long-name, LongBench format", tmp_path / "x.png")
    for figure in figures:
        whole = figure.bbox
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
        for text, box in boxes:
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1, text
        for (one, a), (two, b) in itertools.combinations(boxes, 2):
            width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert width < 2 or height < 2, (one, two)


def texts_of(figure) -> list[Text]:
    """The texts that are drawn: an axis has labels of ticks beyond its ends, which are not."""
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    beyond |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in beyond]


def test_many_families_have_styles_of_their_own(tmp_path, monkeypatch):
    folders = [make_run(tmp_path / "dense", {"qasper": bits("11")}, **DENSE)]
    for number, (k_rule, v_rule) in enumerate(itertools.product("abcd", "efgh")):
        pruned = {"k_rule": k_rule, "v_rule": v_rule, "v_sparsity": 0.5}
        folders.append(make_run(tmp_path / str(number), {"qasper": bits("10")}, **pruned))
    styles = []

    def note(figure, path):
        for drawn in figure.axes[0].containers:
            styles.append((drawn[0].get_color(), drawn[0].get_marker(), drawn[0].get_linestyle()))

    monkeypatch.setattr(plots, "save_figure", note)
    plots.accuracy_by_size(make_report(folders), "many", tmp_path / "x.png")
    assert len(styles) == 17 == len(set(styles))


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert command.main([str(tmp_path / "*_dense"), "--report", str(tmp_path / "out")]) == 2
    assert f"no folder {tmp_path / '*_dense'}" in capsys.readouterr().err


def test_many_runs_are_plotted(tmp_path):
    folders = [make_run(tmp_path / "dense", {"qasper": bits("11")}, **DENSE)]
    for number in range(1, 8):
        folders.append(make_run(tmp_path / str(number), {"qasper": bits("10")}, k_sparsity=number / 10))
    assert write_report(make_report(folders), tmp_path / "out")[3].stat().st_size > 10_000


def run_of(**scores: list[float]) -> Run:
    return Run("any", None, {}, {name: np.array(rows, dtype=float) for name, rows in scores.items()}, None)


def test_intervals_against_published_values():
    # Wilson's for 15 of 148 and 0 of 20: Newcombe 1998 (Statistics in Medicine 17), table I.
    low, high = intervals.wilson(15, 148)
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    assert [round(bound, 4) for bound in intervals.wilson(0, 20)] == [0.0, 0.1611]
    assert intervals.wilson(20, 20) == (pytest.approx(1 - 0.16113, abs=1e-5), 1.0)


def test_intervals_by_hand():
    # Two data sets, of which one is all right: halves of Wilson's distances, added in squares.
    both = intervals.score(run_of(a=[1] * 20, b=[1] * 10 + [0] * 10), ["a", "b"])
    low = intervals.wilson(10, 20)[0]
    assert both.score == 75
    assert both.low == pytest.approx(75 - 50 * (0.161125**2 + (0.5 - low) ** 2) ** 0.5, abs=1e-3)
    # Between right and wrong: 0.5 ten times and 0, 0, 1, 1 have mean 0.5 and variance 1 / 14.
    part = intervals.score(run_of(a=[0.5] * 10), ["a"])
    assert (part.score, part.high - part.low) == (50, pytest.approx(200 * 1.959964 * (1 / 14 / 14) ** 0.5))
    # Pairs: 8 rows of which 2 fell and none rose; with half a row of each outcome -2 of 10, 3 of 10 discordant.
    dense, pruned = run_of(a=[1] * 8), run_of(a=[1] * 6 + [0] * 2)
    found = intervals.difference(pruned, dense, ["a"])
    half = 1.959964 * ((0.3 - 0.2**2) / 10) ** 0.5
    assert found.score == -25
    assert (found.low, found.high) == (pytest.approx(100 * (-0.2 - half)), pytest.approx(100 * (-0.2 + half)))
    # Rows that all agree leave room for a difference: Agresti and Min's 1.96 / (n + 2).
    same = intervals.difference(dense, dense, ["a"])
    assert same.score == 0 and same.high == -same.low == pytest.approx(100 * 1.959964 / 10)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model": "/models/another"}, "model is '/models/tiny'"),
        ({"model_fingerprint": "g"}, "model_fingerprint"),
        ({"max_length": 1024}, "max_length is 512"),
        ({"dtype": "float16"}, "dtype is 'float32'"),
        ({"device": "cuda"}, "device"),
        ({"batch_size": 4}, "batch_size is 1"),
        ({"chat_template": "model"}, "chat_template"),
        ({"sha256": "t"}, "qasper.sha256"),
    ],
)
def test_rows_of_different_configurations_are_refused(tmp_path, capsys, change, names):
    first = make_run(tmp_path / "a", {"qasper": bits("11")}, **DENSE)
    other = make_run(tmp_path / "b", {"qasper": bits("10")}, **change)
    assert command.main([str(first), str(other), "--report", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert names in error and str(other) in error
    assert str(first) in error and "Predict one of them anew" in error
    assert not (tmp_path / "out").exists()


def test_pruned_runs_must_agree_on_the_window(tmp_path):
    dense = make_run(tmp_path / "a", {"qasper": bits("11")}, **DENSE)
    one = make_run(tmp_path / "b", {"qasper": bits("10")})
    other = make_run(tmp_path / "c", {"qasper": bits("10")}, k_sparsity=0.7, residual_length=64)
    with pytest.raises(Exception, match=r"residual_length is 32 in(.|\n)*and 64 in"):
        make_report([dense, one, other])


def test_refusals(tmp_path, capsys):
    one = make_run(tmp_path / "a", {"qasper": bits("110")})
    same = make_run(tmp_path / "b", {"qasper": bits("110")})
    torn = make_run(tmp_path / "c", {"qasper": bits("110")}, drop=1, k_sparsity=0.7)
    fewer = make_run(tmp_path / "d", {"qasper": bits("11")}, k_sparsity=0.7)
    other = make_run(tmp_path / "e", {"lcc": bits("110")}, k_sparsity=0.7)
    by_length = make_run(tmp_path / "f", {"qasper": bits("110")}, benchmark="longbench-e")
    ruler = make_run(tmp_path / "g", {"fwe_400": bits("110")}, benchmark="ruler", k_sparsity=0.7)
    model = make_run(tmp_path / "h", {"qasper": bits("110")}, model="another")
    cases = [
        ([one, same], "both 'K 0.5 V 0'"),
        ([one, one], "given twice"),
        ([one, model], "and 'another' in"),  # and not that both are 'K 0.5 V 0'
        (
            [one, torn],
            "incomplete: qasper has 2 of 3 rows (limited; the data has 200); the command of the run",
        ),
        ([one, fewer], "qasper: rows is 3 in"),
        ([one, other], "no data set in common"),
        ([one, by_length], "--e"),
        ([one, ruler], "benchmark is 'longbench' in"),
        ([one, tmp_path / "none"], "long_test.sh"),
    ]
    for folders, message in cases:
        assert command.main([*map(str, folders), "--report", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    (same / "config.json").write_text("{")
    assert command.main([str(same)]) == 2 and "not valid JSON" in capsys.readouterr().err
    (torn / "qasper.jsonl").write_text('{"pred": "yes"}\n')
    assert command.main([str(torn)]) == 2 and "line 1: missing answers" in capsys.readouterr().err


def test_a_data_set_that_not_all_have_is_left_out_and_told(tmp_path, capsys):
    one = make_run(tmp_path / "a", {"qasper": bits("11"), "lcc": bits("11")}, **DENSE)
    other = make_run(tmp_path / "b", {"qasper": bits("10")})
    assert command.main([str(one), str(other), "--report", str(tmp_path / "out")]) == 0
    assert "left out, not in every run: lcc" in capsys.readouterr().out


def test_rows_are_compared_in_the_order_of_the_data(tmp_path):
    """A run that was resumed, or made by several processes, may hold its lines in any order."""
    folder = make_run(tmp_path / "a", {"qasper": bits("100")})
    lines = (folder / "qasper.jsonl").read_text().splitlines(keepends=True)
    (folder / "qasper.jsonl").write_text(lines[2] + lines[0] + lines[1])
    assert read_run(folder).scores["qasper"].tolist() == [1, 0, 0]


def test_ruler_by_length(tmp_path):
    folder = make_run(
        tmp_path / "a", {"fwe_4096": bits("11"), "vt_4096": bits("10"), "fwe_500": bits("00")}, benchmark="ruler",
        model="/m/tiny", max_length=None, seed=42, **DENSE,
    )  # fmt: skip
    report = make_report([folder])
    assert title_of(report) == "tiny, RULER"
    assert report.columns() == {
        "4k": ["fwe_4096", "vt_4096"], "500": ["fwe_500"], "Average": ["fwe_4096", "vt_4096", "fwe_500"],
    }  # fmt: skip
    write_report(report, tmp_path / "out")
    table = (tmp_path / "out/table.md").read_text()
    assert (
        table.startswith("# tiny, RULER\n")
        and "| dense         |  100.0 % | 75.00 | 0.00 |   50.00 |" in table
    )
    assert "prompts up to" not in table


def test_published_figures_stand_beside(two, tmp_path, capsys):
    published = tmp_path / "published.yaml"
    published.write_text("source: Table 9 of somewhere\nrows:\n  - {name: dense, scores: {Average: 40.5}}\n")
    assert (
        command.main([*map(str, two), "--report", str(tmp_path / "out"), "--published", str(published)]) == 0
    )
    printed = capsys.readouterr().out
    assert (
        "| dense, published |" in printed
        and "40.50" in printed
        and "Published figures: Table 9 of" in printed
    )
    assert "dense,published: Table 9 of somewhere" in (tmp_path / "out/table.csv").read_text()
    for text, message in (
        ("source: x\nrows:\n  - {name: K9, scores: {Average: 1}}\n", "published figures of K9: no such row"),
        ("rows: []\n", "expected the keys source"),
        ("source: x\nrows:\n  - {name: dense, scores: {Average: high}}\n", "row 1"),
        ("a: [", "not valid YAML"),
    ):
        published.write_text(text)
        assert command.main([*map(str, two), "--published", str(published)]) == 2
        assert message in capsys.readouterr().err
