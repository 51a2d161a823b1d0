"""Models on several GPUs: what a cache needs to know of them, which is little.

Each layer of a cache takes its KV heads and its device from the first tokens it gets. So with transformers'
`tp_plan="auto"` every rank compresses the KV heads it computes, and with `device_map="auto"` every layer stays on
its GPU; both need `accelerate` installed. Run a script on the 4 GPUs of one node, or on 2 nodes of 8, with::

    torchrun --nproc_per_node=4 script.py
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=<first node>:29500 script.py

the second command on each of the nodes. In the script, all ranks do the same::

    model = AutoModelForCausalLM.from_pretrained(name, dtype="float16", tp_plan="auto")
    cache = MustafarCache(model.config, k_sparsity=0.7, v_sparsity=0.7)
    output = model.generate(**inputs, past_key_values=cache)
    mustafar.parallel.leave()  # not torch.distributed.destroy_process_group() alone: see there

`device_map="auto"` is for one process, started with plain `python`. A rank's KV heads must be whole ones:
`check_tensor_parallel` says so before a model is loaded, and `MustafarCache` asks it where transformers tells a
config its degree.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import PreTrainedConfig


def check_tensor_parallel(config: PreTrainedConfig, ranks: int) -> None:
    """Whether so many ranks can share the attention heads of a model.

    Raises
    ------
    ValueError
        Naming the degrees that can, if query or KV heads do not divide among `ranks`.
    """
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not heads or ranks < 1 or (kv_heads % ranks == 0 and heads % ranks == 0):
        return
    able = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
    raise ValueError(
        f"tensor parallelism: {heads} query heads and {kv_heads} KV heads cannot be divided among {ranks} ranks, "
        f"as each needs whole heads of both; possible: {', '.join(map(str, able))} (torchrun --nproc_per_node). "
        'device_map="auto" in one process takes any number of GPUs, some layers on each'
    )


def tensor_parallel_ranks(config: PreTrainedConfig) -> int:
    """The degree that the model of `config` was loaded with by its own plan; 1 if it is not known."""
    distributed: Any = getattr(config, "distributed_config", None)
    if distributed is None:
        return 1
    read = distributed.get if isinstance(distributed, dict) else lambda name: getattr(distributed, name, None)
    if isinstance(read("tp_plan"), dict):
        return 1  # a plan of the user's own, which may leave attention whole
    ranks = read("tp_size")
    return ranks if isinstance(ranks, int) else 1


def leave() -> None:
    """Leave the process group at the end of a script, captured graphs first; without one, do nothing.

    NCCL gives a communicator up when no CUDA graph that was captured with it is left, and until then
    `destroy_process_group` waits, without a message. Such graphs are in every `Decoder`, and `generate` with a static
    cache leaves them with torch.compile. Both capture again if they are used later.
    """
    from mustafar.decoding import DECODERS

    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    for decoder in list(DECODERS):
        decoder.forget_step()
    torch.compiler.reset()
    gc.collect()
    torch.distributed.destroy_process_group()
