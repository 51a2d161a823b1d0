"""Measures a case: checks the result, times it, times the dense peers, and yields the report's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from mustafar import CompressedTensor, num_kept, ops, reference
from mustafar.testing import Accuracy

from .flashinfer_peer import first_line
from .peers import Peer, attention_peers, product_peers, topk_gather
from .problem import Corner, Problem
from .shapes import ATTENTION_SECTIONS, Case, Shape
from .timing import Timer, Times

Row = dict[str, object]
#: Caches this small are also timed inside a CUDA graph: elsewhere launches do not show.
GRAPH_DENSE_BYTES = 128 << 20
GRAPH_CALLS = (8, 64)
#: A dense peer's error may be this many times PyTorch's and one rounding: it must only compute the same thing.
PEER_TOLERANCE = 8


@dataclasses.dataclass
class PeerTimes:
    """Milliseconds of one peer, eager and in a CUDA graph."""

    times: Times
    variant: str = ""
    graph_ms: float | None = None


class Bench:
    """Measures cases on one device.

    Attributes
    ----------
    notes : list of str
        What could not be measured and why, for the end of the report.
    """

    def __init__(self, timer: Timer, copy_tb_per_s: float, with_flashinfer: bool) -> None:
        self.timer, self.device = timer, timer.device
        self.copy_tb_per_s, self.with_flashinfer = copy_tb_per_s, with_flashinfer
        self.notes: list[str] = []

    def run(self, case: Case) -> Iterator[Row]:
        """The rows of `case`, as they come."""
        if not self.timer.fits(7 * case.shape.dense_bytes + (4 << 30)):
            self.notes.append(f"{case.section}, {case.shape}: not measured, too little free memory")
            return
        section = {"spmv": self._spmv, "compression": self._compression}.get(case.section, self._attention)
        assert section != self._attention or case.section in ATTENTION_SECTIONS
        yield from section(case)

    def row(self, case: Case, op: str, sparsity: float, layout: str, moved: int, times: Times) -> Row:
        """The columns that every op has; `moved` in bytes."""
        tb_per_s = moved / times.median / 1e9
        return {
            "section": case.section,
            "op": op,
            **dataclasses.asdict(case.shape),
            "sparsity": sparsity,
            "layout": layout,
            "median_ms": times.median,
            "p20_ms": times.p20,
            "p80_ms": times.p80,
            "bytes": moved,
            "tb_per_s": tb_per_s,
            "copy_tb_per_s": self.copy_tb_per_s,
            "fraction_of_copy": tb_per_s / self.copy_tb_per_s,
        }

    def time_peers(
        self, problems: Sequence[Problem], peers: list[Peer], check: Callable[[torch.Tensor], Accuracy]
    ) -> dict[str, PeerTimes]:
        """Times by name of the peers that give the right result; the others are noted.

        The first problem is timed alone, all of them, if there are several, in a CUDA graph.
        """
        found: dict[str, PeerTimes] = {}
        for peer in peers:
            try:
                with peer.context():
                    call = peer.bind(problems[0])
                    got = call()
                result = check(got)
                if result.error > PEER_TOLERANCE * (result.peer + result.floor):
                    raise ArithmeticError(f"wrong result, {result}")
                with peer.context():
                    times = PeerTimes(self.timer(call), peer.variant)
                    if peer.name not in found or times.times.median < found[peer.name].times.median:
                        found[peer.name] = times
                    if len(problems) > 1:
                        times.graph_ms = self.timer.graph([call, *map(peer.bind, problems[1:])])
            except Exception as error:  # a peer that refuses a shape must not end the run; it is reported
                self._note(problems[0].shape, peer, error)
        return found

    def _note(self, shape: Shape, peer: Peer, error: Exception) -> None:
        self.timer.synchronize()  # an error of the device itself ends the case here
        self.notes.append(f"{peer} at {shape}: {type(error).__name__}: {first_line(error)}")

    def copies(self, first: Problem, moved: int) -> list[Problem]:
        """`first`, and on a GPU and for a small cache as many like it as make their `moved` bytes outgrow the L2."""
        if self.device.type != "cuda" or first.shape.dense_bytes > GRAPH_DENSE_BYTES:
            return [first]
        least, most = GRAPH_CALLS
        count = min(most, max(least, -(-2 * self.timer.l2_bytes // moved)))
        return [first, *(Problem(first.shape, self.device, seed) for seed in range(1, count))]

    def _attention(self, case: Case) -> Iterator[Row]:
        problem = Problem(case.shape, self.device)
        corner = Corner(problem)
        peers = attention_peers(case.shape, self.device, self.with_flashinfer)
        dense = self.time_peers(self.copies(problem, case.shape.dense_bytes), peers, corner.attention)
        self.timer.free()
        for layout in ("uniform", "general") if case.general else ("uniform",):
            for sparsity in case.sparsities:
                k, v = problem.compress(sparsity, layout)
                result = corner.attention(problem.attend(k, v), (k, v))
                times = self.timer(lambda k=k, v=v: problem.attend(k, v))
                row = self.row(case, "decode_attention", sparsity, layout, k.nbytes + v.nbytes, times)
                row |= {"graph_ms": self._graph(problem, k, v, sparsity, layout)}
                yield row | against(dense, row) | errors(result)

    def _graph(
        self, problem: Problem, k: CompressedTensor, v: CompressedTensor, sparsity: float, layout: str
    ) -> float | None:
        problems = self.copies(problem, k.nbytes + v.nbytes)
        if len(problems) == 1:
            return None
        caches = [(k, v), *(p.compress(sparsity, layout) for p in problems[1:])]
        for p in problems:
            _ = p.workspace  # allocated outside the capture
        return self.timer.graph(
            [lambda p=p, c=c: p.attend(*c) for p, c in zip(problems, caches, strict=True)]
        )

    def _spmv(self, case: Case) -> Iterator[Row]:
        problem = Problem(case.shape, self.device)
        corner = Corner(problem)
        q, p = problem.q, problem.p
        checks = {"key_scores": corner.key_scores, "value_output": corner.value_output}
        dense = {
            op: self.time_peers([problem], product_peers(op, self.device), check)
            for op, check in checks.items()
        }
        for sparsity in case.sparsities:
            k, v = problem.compress(sparsity)
            for op, c, call in (
                ("key_scores", k, lambda k=k: ops.key_scores(q, k)),
                ("value_output", v, lambda v=v: ops.value_output(p, v)),
            ):
                result = checks[op](call(), c)
                row = self.row(case, op, sparsity, "uniform", c.nbytes, self.timer(call))
                yield row | against(dense[op], row) | errors(result)

    def _compression(self, case: Case) -> Iterator[Row]:
        problem = Problem(case.shape, self.device)
        corner = Corner(problem)
        x = problem.k
        dense_bytes = x.numel() * x.element_size()
        for sparsity in case.sparsities:
            kept = num_kept(sparsity, case.shape.head_dim)
            topk = {"torch_topk": PeerTimes(self.timer(lambda s=sparsity: topk_gather(x, s)))}
            self.timer.free()
            packed = ops.prune_compress(x, kept)
            pruned = ops.decompress(packed)
            general = ops.compress(pruned)
            # What was kept is compared bit for bit with the reference, on the corner.
            want = reference.decompress(reference.prune_compress(corner.of(x), kept))
            right = [same_bits(corner.of(pruned), want), same_bits(corner.decompressed(general), want)]
            for op, layout, c, call, ok in (
                (
                    "prune_compress",
                    "uniform",
                    packed,
                    lambda kept=kept: ops.prune_compress(x, kept),
                    right[0],
                ),
                ("compress", "general", general, lambda pruned=pruned: ops.compress(pruned), right[1]),
                ("decompress", "uniform", packed, lambda c=packed: ops.decompress(c), right[0]),
                ("decompress", "general", general, lambda c=general: ops.decompress(c), right[1]),
            ):
                row = self.row(case, op, sparsity, layout, dense_bytes + c.nbytes, self.timer(call))
                row |= {"q_heads": None, "window": None, "accurate": ok}
                yield row | (against(topk, row) if op == "prune_compress" else {})


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(reference.as_bits(x), reference.as_bits(y))


def errors(result: Accuracy) -> Row:
    """Largest absolute errors against float32: ours, PyTorch's in the same dtype, and whether ours is in bounds."""
    return {"max_error": result.error, "same_dtype_error": result.peer, "accurate": result.ok}


def against(dense: dict[str, PeerTimes], row: Row) -> Row:
    """The columns of the dense peers: their milliseconds, and how many times as fast ours is."""
    ours, ours_in_graph = row["median_ms"], row.get("graph_ms")
    columns: Row = {}
    for name, peer in dense.items():
        columns[f"{name}_ms"], columns[f"{name}_ratio"] = peer.times.median, peer.times.median / ours
        columns[f"{name}_graph_ms"] = peer.graph_ms
    rivals = {name: peer for name, peer in dense.items() if name != "torch_topk"}
    if rivals:
        best = min(rivals, key=lambda name: rivals[name].times.median)
        columns["best_dense"] = f"{best} {rivals[best].variant}".strip()
        columns["vs_best_dense"] = rivals[best].times.median / ours
    in_graph = [peer.graph_ms for peer in rivals.values() if peer.graph_ms is not None]
    if in_graph and ours_in_graph is not None:
        columns["vs_best_dense_graph"] = min(in_graph) / ours_in_graph
    return columns
