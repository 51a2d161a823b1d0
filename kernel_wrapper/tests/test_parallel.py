"""Models on several devices: tensor parallelism over two processes, layers over two GPUs, what cannot be split."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import parallel_worker
import pytest
import torch
from mustafar import Decoder, MustafarCache, decoding
from mustafar.parallel import check_tensor_parallel, leave, tensor_parallel_ranks
from tiny_models import one_thread, prompts, tiny
from transformers import AutoModelForCausalLM, LlamaConfig

__all__ = ["one_thread"]

HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
SECONDS = {"cpu": 240, "cuda": 150}  # of both ranks, from their start


def _prompt() -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompts(2, 90)
    mask = torch.ones_like(ids)
    ids[1, :25] = mask[1, :25] = 0
    return ids, mask


def _can_shard_by_hand() -> bool:
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # noqa: F401
    except ImportError:
        return False
    return torch.distributed.is_available()


def _case(name: str, device: str, kinds: str, *marks: pytest.MarkDecorator) -> object:
    can = parallel_worker.loads_by_itself(device) or (device == "cpu" and _can_shard_by_hand())
    needs = pytest.mark.skipif(not can, reason="needs accelerate")
    return pytest.param(device, kinds.split(), marks=[*marks, needs], id=name)


def _two_ranks(folder: Path, device: str, kinds: list[str]) -> None:
    """parallel_worker.py under torchrun; what its ranks said is in the message of a failure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    log = folder / "ranks.log"  # not a pipe, which a rank that outlives torchrun would keep open
    with log.open("w") as file:
        run = subprocess.Popen(
            [*command, parallel_worker.__file__, str(folder), device, *kinds],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | hidden,
        )
        try:
            how = f"ended with {run.wait(SECONDS[device])}"
        except subprocess.TimeoutExpired:
            how = f"did not end within {SECONDS[device]} s"
            run.terminate()  # torchrun ends its ranks
            try:
                run.wait(10)
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
    assert how == "ended with 0", f"two ranks: {how}\n{log.read_text()[-20000:]}"


TWO_GPUS = (
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
)


@pytest.mark.parametrize(
    "device,kinds",
    [
        _case("cpu", "cpu", "kernel simulate static decoder"),
        _case("cuda", "cuda", "kernel simulate decoder captured", *TWO_GPUS),
        # generate compiles the step, and captures the sums of the ranks in it.
        _case("cuda-compiled", "cuda", "static", *TWO_GPUS),
    ],
)
def test_two_ranks_give_the_tokens_of_one(device: str, kinds: list[str], tmp_path: Path) -> None:
    """torchrun, a KV head each. Sums in another order may flip a near-tie: one of the models must agree, in half
    precision in its first tokens."""
    ids, mask = _prompt()
    torch.save((ids, mask), tmp_path / "prompt.pt")
    expected = {}
    for seed in range(2):
        model = tiny("llama", seed).to(parallel_worker.DTYPE[device])
        model.save_pretrained(tmp_path / f"model_{seed}")
        model.to(device)
        tokens, kv_heads = parallel_worker.decode(model, "kernel", ids.to(device), mask.to(device))
        assert kv_heads == 2
        expected[f"model_{seed}"] = tokens
    tiny("llama", num_key_value_heads=1).save_pretrained(tmp_path / "one_head")

    _two_ranks(tmp_path, device, kinds)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    agreed = []
    for name, tokens in expected.items():
        for kind in kinds:
            got, kv_heads = zip(*(rank[name][kind] for rank in ranks), strict=True)
            assert kv_heads == (1, 1) and torch.equal(*got)
        same = ids.shape[1] + (30 if device == "cpu" else 6)
        mine = [ranks[0][name][kind][0] for kind in kinds]
        agreed.append(all(torch.equal(other[:, :same], tokens[:, :same]) for other in mine))
    assert any(agreed)
    for rank in ranks:
        assert "1 KV heads cannot be divided among 2 ranks" in rank["one_head"]


def test_a_rank_that_fails_is_told(tmp_path: Path) -> None:
    """What its ranks said is in the message."""
    torch.save(_prompt(), tmp_path / "prompt.pt")
    with pytest.raises(AssertionError, match=r"(?s)two ranks: ended with 1\n.*one_head"):
        _two_ranks(tmp_path, "cpu", ["kernel"])  # there are no models


def test_leaving_drops_captured_graphs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for them when a process group is destroyed, and gloo does not: so the order is tested."""
    leave()  # no group: nothing happens
    model = tiny("llama")
    cache = MustafarCache(model.config, 0.6, 0.6, static=True, max_length=64)
    decoder = Decoder(model, cache, 1)
    decoder.graph = torch.nn.Module()  # anything that is gone when nobody has it
    graph, order = weakref.ref(decoder.graph), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.compiler, "reset", lambda: order.append("compiled"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: order.append(graph() is None))
    leave()
    assert order == ["compiled", True] and decoder in decoding.DECODERS
    del decoder
    assert not any(other.cache is cache for other in decoding.DECODERS)


@pytest.mark.parametrize("heads,kv_heads,ranks", [(32, 8, 3), (32, 8, 16), (28, 4, 8), (6, 6, 4)])
def test_heads_that_cannot_be_divided(heads: int, kv_heads: int, ranks: int) -> None:
    config = LlamaConfig(hidden_size=64 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)
    able = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
    message = f"{heads} query heads and {kv_heads} KV heads cannot be divided among {ranks} ranks.*possible: "
    with pytest.raises(ValueError, match=message + ", ".join(able)):
        check_tensor_parallel(config, ranks)
    config.distributed_config = SimpleNamespace(tp_size=ranks, tp_plan=None)
    with pytest.raises(ValueError, match=message):
        MustafarCache(config)
    for degree in map(int, able):
        check_tensor_parallel(config, degree)


@pytest.mark.parametrize(
    "distributed,ranks",
    [
        (None, 1),
        ({"tp_size": 4}, 4),
        (SimpleNamespace(tp_size=2, tp_plan="auto"), 2),
        (SimpleNamespace(tp_size=None), 1),
        ({"tp_size": 4, "tp_plan": {"layers.*.mlp.up_proj": "colwise"}}, 1),
    ],
    ids=str,
)
def test_degree_of_a_loaded_model(distributed: object, ranks: int) -> None:
    assert tensor_parallel_ranks(SimpleNamespace(distributed_config=distributed)) == ranks


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.skipif(not HAS_ACCELERATE, reason="needs accelerate")
@pytest.mark.parametrize("kind", ["kernel", "simulate", "static", "decoder"])
def test_layers_on_two_gpus(kind: str, tmp_path: Path) -> None:
    ids, mask = (x.cuda() for x in _prompt())
    agreed = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        tiny("llama", seed).half().save_pretrained(folder)
        one = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cuda:0").eval()
        parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
        parts |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
        two = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map=parts).eval()
        results = [parallel_worker.decode(model, kind, ids, mask)[0] for model in (one, two)]
        agreed.append(torch.equal(*results))
    assert any(agreed)
