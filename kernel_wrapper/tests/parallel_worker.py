"""What each rank of test_parallel.py runs under torchrun: a sharded model decodes with every kind of cache.

Arguments: a folder with model_<seed>/ and one_head/, where it leaves rank<r>.pt; cpu or cuda; kinds of cache. A rank
that waits for another one says so instead of hanging: each stage has a limit, after which it prints where it is.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch
from mustafar import Decoder, MustafarCache
from mustafar.parallel import leave
from tiny_models import generate
from transformers import AutoModelForCausalLM, PreTrainedModel

SHORT = {"residual_length": 8, "flush_every": 16}
DTYPE = {"cpu": torch.float32, "cuda": torch.float16}
STAGE_SECONDS = {"cpu": 120, "cuda": 70}
START = time.monotonic()
CACHES = {
    "kernel": {},
    "simulate": {"backend": "simulate"},
    "static": {"static": True, "max_length": 200},
    "decoder": {"static": True, "max_length": 200},
    "captured": {"static": True, "max_length": 200},
}


def loads_by_itself(device: str) -> bool:
    """Whether `tp_plan="auto"` works here: it needs accelerate, and picks a GPU where torch is made for them."""
    suits = device == "cuda" or torch.version.cuda is None
    return suits and importlib.util.find_spec("accelerate") is not None


def load(folder: Path, device: str) -> PreTrainedModel:
    """The model, this rank's part of it: by transformers' own loading, or by what that is made of."""
    if loads_by_itself(device):
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=DTYPE[device]).eval()
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    ranks = torch.distributed.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    expand = getattr(model, "_expand_parallel_plan", None)  # transformers 5.17 takes the plan from the model
    plan = () if expand is None else (expand(dict(model.tp_plan)),)
    model = apply_tensor_parallelism(model, mesh, *plan)
    model.config.distributed_config = DistributedConfig(tp_size=ranks)
    return model


def decode(model: PreTrainedModel, kind: str, ids: torch.Tensor, mask: torch.Tensor) -> tuple:
    """Tokens [B, T] of one kind of cache, and the KV heads that the cache holds."""
    cache = MustafarCache(model.config, 0.6, 0.6, **CACHES[kind], **SHORT)
    if kind in ("decoder", "captured"):
        decoder = Decoder(model, cache, len(ids), graph=kind == "captured")
        tokens = decoder.generate(ids, mask, 30).sequences
    else:
        tokens = generate(model, ids, cache, 30, attention_mask=mask)
    return tokens.cpu(), cache.layers[0].kv_heads


def begin(stage: str, device: str) -> None:
    """Say what comes, and give it its time: the process ends behind that, with the lines that its threads are at."""
    rank = os.environ["RANK"]
    print(f"rank {rank}, {time.monotonic() - START:.1f} s: {stage}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback_later(STAGE_SECONDS[device], exit=True)


def connect(device: str) -> None:
    """Before transformers does it, whose limit for a rank that does not come is two hours."""
    limit = datetime.timedelta(seconds=STAGE_SECONDS[device])
    if device == "cpu":
        torch.distributed.init_process_group("gloo", timeout=limit)
        return
    here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(here)
    torch.distributed.init_process_group("nccl", timeout=limit, device_id=here)


def main(folder: Path, device: str, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    begin("connecting", device)
    connect(device)
    rank = torch.distributed.get_rank()
    ids, mask = torch.load(folder / "prompt.pt")
    found: dict = {}
    for path in sorted(folder.glob("model_*")):
        begin(f"loading {path.name}", device)
        model = load(path, device)
        here = ids.to(model.device), mask.to(model.device)
        found[path.name] = {}
        for kind in kinds:
            begin(f"{path.name}, {kind}", device)
            found[path.name][kind] = decode(model, kind, *here)
    begin("loading one_head", device)
    try:
        MustafarCache(load(folder / "one_head", device).config)
    except ValueError as error:
        found["one_head"] = str(error)
    torch.save(found, folder / f"rank{rank}.pt")
    begin("leaving", device)
    leave()
    begin("left", device)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
