"""kill -9 at random moments of predictions, sweeps and evaluations, resumed: the files of an undisturbed run.

Eight kills each; MUSTAFAR_KILLS=50 makes it fifty.
"""

from __future__ import annotations

import json
import shutil
import time

import pytest
from crash_helpers import Commands, Killer, kills
from longbench_helpers import make_model, make_rows, write_jsonl

PREDICT, EVALUATE, SWEEP = (
    f"benchmarks.{name}" for name in ("longbench.predict", "longbench.evaluate", "sweep.command")
)
TASK = {"prompt": "{context} {input}", "max_new_tokens": 6, "metric": "qa_f1"}
PLAN = """
options: {batch_size: 2, residual_length: 8, limit: 4}
rows:
  - {name: Dense}
  - {name: K0.5 V0.7, k_sparsity: 0.5, v_sparsity: 0.7}
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model, two data sets, and a plan."""
    folder = tmp_path_factory.mktemp("given")
    make_model(folder / "tiny")
    for number, name in enumerate(("one", "two")):
        write_jsonl(folder / f"data/{name}.jsonl", make_rows(12, words=60, seed=number))
    (folder / "data/tasks.json").write_text(json.dumps({"one": TASK, "two": TASK}))
    (folder / "plan.yaml").write_text(PLAN)
    return folder


@pytest.fixture
def predict_argv(given):
    def argv(out):
        rest = ["--residual_length", "8", "--data_dir", str(given / "data"), "--device", "cpu"]
        return ["0.5", "0.5", str(given / "tiny"), "mustafar", *rest, "--output_dir", str(out)]

    return argv


def contents(folder) -> dict[str, bytes]:
    """Every file of a folder but locks; a config without the run's date."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(".lock"):
            continue
        content = path.read_bytes()
        if path.name == "config.json":
            content = json.dumps(json.loads(content) | {"environment": None}).encode()
        found[str(path.relative_to(folder))] = content
    return found


def check_partial(found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """What a kill leaves: files that are whole, or whole lines at the beginning of one and a piece of the next."""
    for name, content in found.items():
        if name.endswith(".tmp"):
            continue
        if name.endswith(".jsonl"):
            assert whole[name].startswith(content), name
        elif not name.endswith("config.json"):
            assert content == whole[name], name


def kill_and_resume(commands, module, argv, out, whole, seconds, seed):
    """Run a command that writes to `out` until it is through, again and again from nothing, killed on the way."""
    killer = Killer(commands, seconds, seed)
    runs = 0
    while killer.killed < kills() or runs == 0:
        shutil.rmtree(out, ignore_errors=True)
        while not killer.run(module, argv):
            check_partial(contents(out), whole)
        assert {name: c for name, c in contents(out).items() if not name.endswith(".tmp")} == whole
        runs += 1
    assert killer.killed == kills()


def test_predictions(commands, given, predict_argv, tmp_path):
    ended = commands.run(PREDICT, predict_argv(tmp_path / "whole"))
    assert ended.status == 0, ended.printed
    ended = commands.run(PREDICT, predict_argv(tmp_path / "timed"))  # the first one waited for the imports
    whole = contents(tmp_path / "whole")
    assert (
        len(whole) == 3 and sum(text.count(b"\n") for name, text in whole.items() if ".jsonl" in name) == 24
    )
    out = tmp_path / "out"
    kill_and_resume(commands, PREDICT, predict_argv(out), out, whole, ended.seconds, seed=1)
    # Resuming removes what kills left of files that were being replaced.
    assert commands.run(PREDICT, predict_argv(out)).status == 0
    assert not list(out.rglob("*.tmp"))


def test_evaluations(commands, predict_argv, tmp_path):
    ended = commands.run(PREDICT, [*predict_argv(tmp_path / "whole"), "--limit", "6"])
    assert ended.status == 0, ended.printed
    (folder,) = (tmp_path / "whole/pred").iterdir()
    predicted = contents(folder)
    assert commands.run(EVALUATE, ["--model", str(folder)]).status == 0
    ended = commands.run(EVALUATE, ["--model", str(folder)])
    whole = contents(folder)
    assert whole.keys() - predicted.keys() == {"result.json"}
    killer = Killer(commands, ended.seconds, seed=2)
    while killer.killed < kills():
        (folder / "result.json").unlink(missing_ok=True)
        while not killer.run(EVALUATE, ["--model", str(folder)]):
            check_partial(contents(folder), whole)
        assert {name: c for name, c in contents(folder).items() if not name.endswith(".tmp")} == whole


def test_sweeps(commands, given, tmp_path):
    def argv(out):
        fixed = ["--model", str(given / "tiny"), "--data_dir", str(given / "data"), "--device", "cpu"]
        return [str(given / "plan.yaml"), *fixed, "--output_dir", str(out)]

    ended = commands.run(SWEEP, argv(tmp_path / "whole"))
    assert ended.status == 0, ended.printed
    whole = contents(tmp_path / "whole")
    assert {name.rsplit("/")[-1] for name in whole} >= {"one.jsonl", "table.md", "table.csv", "by_task.png"}
    out = tmp_path / "out"
    kill_and_resume(commands, SWEEP, argv(out), out, whole, ended.seconds, seed=3)


def test_a_second_run_is_refused_while_the_first_goes_on_and_not_after_its_kill(
    commands, predict_argv, tmp_path
):
    out = tmp_path / "out"
    first = commands.start(PREDICT, predict_argv(out))
    deadline = time.monotonic() + 60
    while first.is_alive() and not list(out.rglob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.001)
    second = Commands(tmp_path).run(PREDICT, predict_argv(out))
    alive = first.is_alive()
    first.kill()
    first.join()
    assert alive, "the run was over before another could be started"
    assert second.status == 2 and "another run is writing to" in second.printed
    third = commands.run(PREDICT, predict_argv(out))
    assert third.status == 0, third.printed
