"""Training: one CUDA graph per length of context holds a whole step, the making of its batch included."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaForCausalLM

from demo.batches import layout, make_batch
from demo.tasks import PLACEHOLDERS, TASKS, Rng

#: Context curriculum: sentences of 8 words, and the share of the run after which the next length starts even if
#: this one is not learnt.
STAGES = ((4, 0.15), (8, 0.27), (16, 0.37), (32, 0.45), (64, 0.53), (128, 0.61), (256, 0.72), (448, 1.0))
LEARNT = 0.95  # mean over the tasks
HINTS, EASE = 0.5, 1.0  # of Rng
#: Tokens of a batch: looking things up is found out in many small steps, long contexts need larger ones.
SHORT, SHORT_BATCH, LONG_BATCH = 32, 12288, 32768
WARM_UP_STEPS = 500
LEVEL = 0.6  # share of the run with the full learning rate


def _causal_attention(module, query, key, value, attention_mask, **kwargs):
    """Plain causal attention. transformers makes no mask for a name it does not know: nothing synchronises."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None


AttentionInterface.register("demo_causal", _causal_attention)


class Trainer:
    """A model, its optimizer, and on a GPU a graph of the step for each length of context."""

    def __init__(
        self, model: LlamaForCausalLM, peak_rate: float, names: Sequence[str], batch_share: float = 1.0
    ) -> None:
        self.model, self.peak_rate, self.names = model, peak_rate, tuple(names)
        self.batch_share = batch_share
        self.device = model.device.type
        self.rng = Rng(self.device, hints=HINTS, ease=EASE)
        self.rate = torch.tensor(peak_rate, device=self.device)
        on_gpu = self.device == "cuda"
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=self.rate,
            betas=(0.9, 0.98),
            fused=on_gpu,
            capturable=on_gpu,
        )
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        #: Share of right words by task, over the words that carry the answer; running mean. Then the loss.
        self.right = torch.zeros(len(self.names), device=self.device)
        self.loss = torch.zeros((), device=self.device)

    def _step(self, sentences: int) -> None:
        length, columns = layout(sentences, self.names)
        tokens = SHORT_BATCH if sentences <= SHORT else LONG_BATCH
        rows = max(1, int(self.batch_share * tokens) // length // len(self.names))
        ids = make_batch(self.rng, rows, sentences, (0.1, 1.0), self.names)
        self.optimizer.zero_grad(set_to_none=True)
        losses, right = [], []
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda", cache_enabled=False):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state
            for index, (name, place) in enumerate(columns.items()):
                mine = slice(index * rows, (index + 1) * rows)
                column = self._column(f"columns/{sentences}/{name}", place)
                target = ids[mine].index_select(1, column + 1)
                logits = self.model.lm_head(hidden[mine].index_select(1, column)).float()
                losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
                hit = (logits.argmax(-1) == target).float().view(rows, *place.shape).mean((0, 1))
                # The words of the answer that only the context tells.
                parts = TASKS[name].answer.split()
                told = [i for i, part in enumerate(parts) if part in PLACEHOLDERS]
                right.append(torch.stack([hit[i] for i in told]).amin())
        loss = torch.stack(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.right.lerp_(torch.stack(right), 0.02)
        self.loss.lerp_(loss.detach(), 0.02)

    def _column(self, key: str, place: torch.Tensor) -> torch.Tensor:
        """`place` flat on the device; made before the graph is captured, which copies nothing from the host."""
        if key not in self.rng.tables:
            self.rng.tables[key] = place.flatten().to(self.device)
        return self.rng.tables[key]

    def step(self, sentences: int) -> None:
        """One optimizer step on contexts of so many sentences."""
        if self.device != "cuda":
            return self._step(sentences)
        if sentences not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step(sentences)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                self._step(sentences)
            self.graphs[sentences] = graph
        self.graphs[sentences].replay()

    def schedule(self, step: int, progress: float) -> None:
        """Learning rate: linear warm-up, level, then cosine to 2 %."""
        share = min(1.0, (step + 1) / WARM_UP_STEPS)
        if progress > LEVEL:
            share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - LEVEL) / (1 - LEVEL))))
        self.rate.fill_(self.peak_rate * share)


def train(trainer: Trainer, minutes: float, longest: int, report_seconds: float = 10.0) -> None:
    """Run the curriculum for so many minutes; one step in four is on a shorter length, so none is forgotten."""
    stages = [stage for stage in STAGES if stage[0] <= longest]
    start = reported = time.perf_counter()
    at_once = 100 if trainer.device == "cuda" else 10  # steps between looks at the clock
    step = current = entered = 0
    while (progress := (time.perf_counter() - start) / 60 / minutes) < 1:
        for _ in range(at_once):
            trainer.schedule(step, progress)
            shorter = current > 0 and step % 4 == 3
            trainer.step(stages[(step // 4) % current if shorter else current][0])
            step += 1
        right = trainer.right.tolist()  # waits for the device, so that the clock is honest
        late = progress > stages[current][1] or sum(right) / len(right) >= LEARNT
        if late and current + 1 < len(stages) and step - entered >= 300:
            current, entered = current + 1, step
        if time.perf_counter() - reported >= report_seconds:
            reported = time.perf_counter()
            shares = " ".join(f"{n} {100 * r:.1f}" for n, r in zip(trainer.names, right, strict=True))
            print(
                f"{(reported - start) / 60:5.2f} min  step {step}  sentences {stages[current][0]}  "
                f"loss {trainer.loss.item():.4f}  right: {shares}",
                flush=True,
            )
    print(
        f"trained {step} steps in {(time.perf_counter() - start) / 60:.1f} min, last loss {trainer.loss.item():.5f}",
        flush=True,
    )
