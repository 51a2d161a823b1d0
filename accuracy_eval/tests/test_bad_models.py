"""Checkpoints and data that a run cannot use: a message with the thing and the remedy, and no traceback."""

from __future__ import annotations

import json

import pytest
from benchmarks.longbench import predict
from benchmarks.shared import models
from longbench_helpers import make_model, make_rows, make_tokenizer, read_jsonl, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = {"prompt": "{context} {input}", "max_new_tokens": 2, "metric": "qa_f1"}
SMALL = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, capsys):
    write_jsonl(tmp_path / "rows/mine.jsonl", make_rows(2, words=50))
    (tmp_path / "rows/tasks.json").write_text(json.dumps({"mine": TASK}))

    def predict_with(model, *arguments):
        fixed = [
            "--data_dir",
            str(tmp_path / "rows"),
            "--output_dir",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
        status = predict.main([*arguments[:2], str(model), *arguments[2:], *fixed])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return predict_with


def checkpoint(folder, kind, **changes):
    """Write a random model of a kind, or its config alone where it is no decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {name: value for name, value in (SMALL | changes).items() if value is not None}
    config = AutoConfig.for_model(kind, **given)
    if kind == "t5":
        config.save_pretrained(folder)
    else:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("t5", {}, "model type 't5' is an encoder-decoder; only decoders are supported"),
        ("mamba", {}, "model type 'mamba' has no layer of full attention to prune"),
        ("llama", {"head_dim": 512}, "model type 'llama' has head_dim 512; at most 256 is supported"),
        ("gemma2", {}, 'soft-caps its attention scores (attn_logit_softcapping), which decoding on the compressed'),
        (
            "gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"]},
            "the model cannot run with this cache: GptOssAttention needs attention sinks (s_aux)",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_pruned(run, tmp_path, kind, changes, message):
    model = checkpoint(tmp_path / kind, kind, **changes)
    status, _, err = run(model, "0.5", "0.5", "mustafar")
    assert status == 2 and message in err and "Traceback" not in err
    if kind != "t5":  # dense they run, by whatever attention they have
        assert run(model, "0", "0", "dense")[0] == 0
        written = next((tmp_path / "out/pred").glob("*_dense")) / "mine.jsonl"
        assert len(read_jsonl(written)) == 2


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("llama", {"head_dim": 20}, (), "tiny has head_dim 20; the GPU kernels take multiples of 8 up to 256: "),
        ("qwen2", {"head_dim": None, "hidden_size": 40}, (), "tiny has head_dim 20; the GPU kernels"),
        ("llama", {}, ("--dtype", "float32"), "--dtype float32: the GPU kernels take float16 and bfloat16: leave"),
    ],
)  # fmt: skip
def test_what_the_gpu_kernels_do_not_take(run, tmp_path, monkeypatch, kind, changes, options, message):
    model = checkpoint(tmp_path / "tiny", kind, **changes)
    assert run(model, "0.5", "0.5", "mustafar", *options)[0] == 0  # on a CPU
    monkeypatch.setattr(models, "resolve_device", lambda given: "cuda")
    status, _, err = run(model, "0.5", "0.5", "mustafar", *options)
    assert status == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize("mode", ["dense", "mustafar"])
def test_damaged_checkpoints(run, tmp_path, mode):
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "tiny", layers=1)
    path = model / "model.safetensors"
    whole = path.read_bytes()
    sparsity = "0" if mode == "dense" else "0.5"

    weights = load_file(path)
    weights.pop("model.layers.0.self_attn.k_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    status, _, err = run(model, sparsity, sparsity, mode)
    assert (
        status == 2
        and "the checkpoint lacks 1 weights, such as model.layers.0.self_attn.k_proj.weight" in err
    )

    path.write_bytes(whole[: len(whole) // 2])
    status, _, err = run(model, sparsity, sparsity, mode, "--dtype", "bfloat16")
    assert status == 2 and "a weight file is damaged" in err and "download the checkpoint again" in err

    path.unlink()
    status, _, err = run(model, sparsity, sparsity, mode, "--dtype", "float16")
    assert status == 2 and "cannot load tiny" in err and "model.safetensors" in err


def test_data_that_lacks_rows(run, tmp_path):
    model = make_model(tmp_path / "tiny", layers=1)
    write_jsonl(tmp_path / "rows/trec.jsonl", make_rows(2))
    status, out, err = run(model, "0", "0", "dense", "--datasets", "trec", "--limit", "1")
    assert status == 0, err
    assert "trec.jsonl holds 2 of the 200 rows of trec: its score is not LongBench's" in out
    (tmp_path / "rows/trec.jsonl").write_text("\n\n")
    status, _, err = run(model, "0", "0", "dense", "--datasets", "trec")
    assert status == 2 and "trec.jsonl holds no rows" in err
    line = json.dumps(make_rows(1)[0])
    (tmp_path / "rows/trec.jsonl").write_text(
        f"{line}\n{line[: len(line) // 2]}"
    )  # a download that broke off
    status, _, err = run(model, "0", "0", "dense", "--datasets", "trec")
    assert status == 2 and "trec.jsonl, line 2: not valid JSON" in err
