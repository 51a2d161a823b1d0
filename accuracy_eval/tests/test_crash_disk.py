"""Full disks and folders that cannot be written: a clear error, no cut-off file, and the same files afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess

import pytest
from benchmarks.longbench import evaluate, predict
from benchmarks.shared import store
from benchmarks.sweep import command as sweep
from longbench_helpers import make_model, make_rows, read_jsonl, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = {"prompt": "{context} {input}", "max_new_tokens": 2, "metric": "qa_f1"}
PLAN = "rows: [{name: Dense}, {name: V0.7, v_sparsity: 0.7}]"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    make_model(folder / "tiny", layers=1)
    for name in ("one", "two"):
        write_jsonl(folder / f"data/{name}.jsonl", make_rows(3))
    (folder / "data/tasks.json").write_text(json.dumps({"one": TASK, "two": TASK}))
    (folder / "plan.yaml").write_text(PLAN)
    return folder


@pytest.fixture
def commands(given, capsys, monkeypatch):
    """Run a prediction (of one process or two), its evaluation or a sweep to a folder -> (status, stderr)."""

    def run(kind, out):
        rest = ["--data_dir", str(given / "data"), "--output_dir", str(out), "--device", "cpu"]
        if kind == "predict":
            status = predict.main(["0", "0", str(given / "tiny"), "dense", *rest])
        elif kind == "processes":
            monkeypatch.setenv("WORLD_SIZE", "2")
            status = 0
            for rank in "01":
                monkeypatch.setenv("RANK", rank)
                status = status or predict.main(["0", "0", str(given / "tiny"), "dense", *rest])
            monkeypatch.delenv("WORLD_SIZE")
        elif kind == "sweep":
            status = sweep.main([str(given / "plan.yaml"), "--model", str(given / "tiny"), *rest])
        else:
            (folder,) = (out / "pred").iterdir()
            status = evaluate.main(["--model", str(folder)])
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def small_disk(tmp_path):
    """Make a file system of some KiB: small_disk(64) -> its folder."""
    mounted = []

    def make(kib):
        folder = tmp_path / f"disk{kib}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    if not shutil.which("mount"):
        pytest.skip("there is no mount command here")
    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def contents(folder) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: text for name, text in found.items() if "/.lock" not in name and "config.json" not in name}


def check_whole(out, whole) -> None:
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        assert path.suffix != ".tmp"
        if "parts" in path.parts and path.suffix == ".jsonl":
            assert not path.stat().st_size or read_jsonl(path)
        elif path.suffix == ".jsonl":
            assert whole[name].startswith(path.read_bytes())
            assert not path.stat().st_size or read_jsonl(path)  # whole lines
        elif path.name == "config.json":
            json.loads(path.read_text())
        elif path.is_file() and not path.name.startswith(".lock"):
            assert path.read_bytes() == whole[name]


@pytest.mark.parametrize(
    ("failing", "code"), [("write", errno.ENOSPC), ("fsync", errno.EIO), ("open", errno.ENOSPC)]
)
@pytest.mark.parametrize("kind", ["predict", "processes", "evaluate", "sweep"])
def test_every_write_may_fail(commands, tmp_path, monkeypatch, kind, failing, code):
    """The n-th write, fsync or opening of a result file fails, after a part of it was written; for every n."""
    if kind == "evaluate":
        assert commands("predict", tmp_path / "whole")[0] == 0
    real = {name: getattr(os, name) for name in ("write", "fsync", "open")}
    left = -1

    def fail(first, *rest):
        nonlocal left
        left -= 1
        if left == 0:
            if failing == "write":
                real["write"](first, rest[0][: len(rest[0]) // 2])
            raise OSError(code, os.strerror(code))
        return real[failing](first, *rest)

    class Failing:
        """`os`, for `store` alone."""

        def __getattr__(self, name):
            return fail if name == failing else getattr(os, name)

    out = tmp_path / "out"
    if kind == "evaluate":
        shutil.copytree(tmp_path / "whole", out)
    status, err = commands(kind, tmp_path / "whole")
    assert status == 0, err
    whole = contents(tmp_path / "whole")
    monkeypatch.setattr(store, "os", Failing())
    for count in range(1, 100):
        left = count
        status, err = commands(kind, out)
        if status == 0:
            break
        assert status == 2, err
        assert f"error: cannot write {out}" in err and os.strerror(code) in err and "Traceback" not in err
        check_whole(out, whole)
    # An evaluation writes one file; others resume, so that a later write fails each time.
    assert count == 2 if kind == "evaluate" else count > 3
    assert contents(out) == whole


@pytest.mark.parametrize("kind", ["predict", "sweep"])
def test_a_small_disk_fills(commands, small_disk, tmp_path, kind):
    assert commands(kind, tmp_path / "whole")[0] == 0
    whole = contents(tmp_path / "whole")
    disk = small_disk(64)
    ballast = disk / "ballast"
    fills = 0
    for free in (0, 4, 8, 12, 16, 24, 32):  # KiB
        ballast.unlink(missing_ok=True)
        usage = shutil.disk_usage(disk)
        ballast.write_bytes(b"x" * max(0, usage.free - 1024 * free))
        status, err = commands(kind, disk / "out")
        if status:
            assert status == 2 and "No space left on device" in err and "Traceback" not in err, err
            fills += 1
        if (disk / "out").exists():
            check_whole(disk / "out", whole)
    assert fills >= 2
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert commands(kind, disk / "out")[0] == 0
    assert contents(disk / "out") == whole


@pytest.mark.parametrize("kind", ["predict", "evaluate", "sweep"])
def test_a_read_only_folder(commands, small_disk, tmp_path, kind):
    disk = small_disk(4096)  # root may write anywhere but to a disk that is read-only
    out = disk / "out"
    assert commands("predict", out)[0] == 0
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    status, err = commands(kind, out)
    assert status == 2 and "cannot write" in err and "Read-only file system" in err and "Traceback" not in err
    assert contents(disk) == before
