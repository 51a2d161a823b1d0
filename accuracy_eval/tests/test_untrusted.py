"""Models, data and paths that nobody vouches for: no code of a checkpoint, no path out of a folder, no shell."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from benchmarks.analysis import capture
from benchmarks.longbench import data, predict
from benchmarks.longbench.tasks import extra_tasks, longbench_tasks, select_tasks
from benchmarks.shared import models
from benchmarks.shared.errors import UserError
from benchmarks.shared.yamlfile import read_yaml
from longbench_helpers import ACCURACY_EVAL, make_model, make_rows, read_jsonl, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = {"prompt": "{context} {input}", "max_new_tokens": 2, "metric": "qa_f1"}


def with_code(folder, ran):
    """Let a checkpoint ask for code of its own, which makes the file `ran`."""
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += f"open({str(ran)!r}, 'w').close()\n"
    code += (
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\nclass MyModel(LlamaForCausalLM):\n    pass\n"
    )
    (folder / "mine.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    config["model_type"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("answer", ["y\n" * 9, ""])
def test_a_checkpoints_code_is_not_run(tmp_path, monkeypatch, answer):
    """Nor is anybody asked, whose `yes |` would allow it."""
    folder = make_model(tmp_path / "tiny", layers=1)
    with_code(folder, tmp_path / "ran")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    with pytest.raises(UserError, match="own code is never run here"):
        models.inspect_model(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_known_architecture_is_not_run(tmp_path, monkeypatch, where):
    """A Llama that brings code: transformers' own classes are taken, for the model and the tokenizer."""
    folder = make_model(tmp_path / "tiny", layers=1)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine:\n    pass\n")
    found = json.loads((folder / where).read_text())
    mine = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    found["auto_map"] = {"AutoTokenizer": ["mine.Mine", None]} if "tokenizer" in where else mine
    (folder / where).write_text(json.dumps(found))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    write_jsonl(tmp_path / "data/one.jsonl", make_rows(1))
    (tmp_path / "data/tasks.json").write_text(json.dumps({"one": TASK}))
    rest = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    for k, mode in (("0", "dense"), ("0.5", "mustafar")):
        assert predict.main([k, "0", str(folder), mode, *rest]) == 0
    capture.load(models.inspect_model(str(folder)), "float32", "cpu")
    assert not (tmp_path / "ran").exists()


class Evil:
    """Unpickled, makes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_run_no_code(tmp_path, capsys):
    folder = make_model(tmp_path / "tiny", layers=1)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    write_jsonl(tmp_path / "data/one.jsonl", make_rows(1))
    (tmp_path / "data/tasks.json").write_text(json.dumps({"one": TASK}))
    rest = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    status = predict.main(["0", "0", str(folder), "dense", *rest])
    assert status == 2 and "could run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_yaml_makes_no_objects(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(f"rows: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        read_yaml(path)
    assert not (tmp_path / "ran").exists()


def test_the_archive_is_read_and_never_unpacked(tmp_path, monkeypatch):
    """Members with paths to elsewhere stay in it, and a link is not followed."""
    evil = ["../data/lcc.jsonl", "/tmp/evil.jsonl", "data/../../evil.jsonl", "data\\lcc.jsonl", "evil.jsonl"]
    link = zipfile.ZipInfo("data/trec.jsonl")
    link.external_attr = 0o120777 << 16
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in/data.zip", "w") as archive:
        for name in evil:
            archive.writestr(name, json.dumps(make_rows(1, seed=5)[0]) + "\n")
        archive.writestr(link, str(tmp_path / "secret.jsonl"))
        archive.writestr("data/lcc.jsonl", json.dumps(make_rows(1)[0]) + "\n")
    write_jsonl(tmp_path / "secret.jsonl", make_rows(1))
    monkeypatch.setattr(data, "_download", lambda: str(tmp_path / "in/data.zip"))
    monkeypatch.setattr(data, "DEFAULT_DIR", tmp_path / "none")
    before = sorted(tmp_path.rglob("*"))
    tasks = longbench_tasks()
    assert data.load_rows(tasks["lcc"], None, longbench_e=False).rows == make_rows(1)
    with pytest.raises(UserError, match="not valid JSON"):  # the text that a link holds is no row
        data.load_rows(tasks["trec"], None, longbench_e=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".lock", ""])
def test_names_of_tasks_are_no_paths(tmp_path, name):
    (tmp_path / "tasks.json").write_text(json.dumps({name: TASK}))
    with pytest.raises(UserError, match="cannot be a task's name"):
        extra_tasks(tmp_path)
    with pytest.raises(UserError, match="unknown data set"):
        select_tasks([name], None, longbench_e=False)


AWKWARD = 'it\'s a "tiny" $(touch ran) `touch ran`; touch ran & *'


@pytest.mark.parametrize("options", [[], ["--chat_template=$(touch ran)"]])
def test_long_test_with_awkward_paths(tmp_path, options):
    """Spaces, quotes and commands in the paths of the script, the model, the data and the output."""
    place = tmp_path / AWKWARD
    model = make_model(place / AWKWARD, layers=1)
    write_jsonl(place / "data/one.jsonl", make_rows(1))
    (place / "data/tasks.json").write_text(json.dumps({"one": TASK}))
    os.symlink(ACCURACY_EVAL, place / "eval")
    command = ["bash", str(place / "eval/long_test.sh"), "0", "0", str(model), "dense", *options]
    command += ["--data_dir", str(place / "data"), "--output_dir", str(place / "out"), "--device", "cpu"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert not list(tmp_path.rglob("ran"))
    if options:
        assert done.returncode == 2 and "invalid choice: '$(touch ran)'" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    (path,) = (place / "out").rglob("one.jsonl")
    assert len(read_jsonl(path)) == 1 and AWKWARD in path.parent.name
