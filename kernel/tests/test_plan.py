"""How attention's launches are cut into splits and clusters: host code, so nvcc is enough and no GPU is needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
WARPS, SMS = 12, 132  # of a block, one on each SM of an H200
# Clusters of so many blocks that an H200 said it holds at once, where they matter here.
CLUSTERS = {2: 66, 4: 30, 7: 15, 8: 15, 10: 7, 12: 7, 14: 7, 16: 7}

PROBE = r"""
#include <cstdio>
#include <cstdlib>
#include "launch.cuh"
using namespace mustafar::cuda;
struct Some {
  static constexpr double kCombineOverhead = 0.5;
  const int* known;
  int64_t operator()(int splits) const { return known[splits]; }
};
int main(int argc, char** argv) {  // batch, query heads, KV heads, units, warps, SMs, then pairs of size and clusters
  int known[kMostClusterBlocks + 1] = {};
  for (int i = 7; i < argc; i += 2) known[atoi(argv[i])] = atoi(argv[i + 1]);
  const auto of = [&](int i) { return atoi(argv[i]); };
  const Plan plan = make_plan(of(1), of(2), of(3), 8, of(4), of(5), of(6), Some{known});
  const Plan other = make_plan(of(1), of(2), of(3), 8, of(4), of(5), of(6));
  printf("%d %d %d %d", plan.splits, plan.clustered, other.splits, other.clustered);
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if NVCC is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "probe.cu").write_text(PROBE)
    command = [NVCC, "-std=c++17", f"-I{CSRC}", "-o", str(folder / "probe"), str(folder / "probe.cu")]
    subprocess.run(command, check=True)
    return folder / "probe"


def plan(
    probe: Path, batch: int, kv_heads: int, tokens: int, clusters: dict[int, int]
) -> tuple[int, bool, int]:
    """Splits, whether they are clusters, and the splits of a kernel that has none. Window capacity 351 tokens."""
    sizes = [str(x) for pair in clusters.items() for x in pair]
    shape = (batch, 4 * kv_heads, kv_heads, tokens // 64 + 6, WARPS, SMS)
    out = subprocess.run([probe, *map(str, shape), *sizes], check=True, capture_output=True, text=True).stdout
    splits, clustered, without, never = map(int, out.split())
    assert not never
    return splits, bool(clustered), without


@pytest.mark.parametrize(
    "batch,kv_heads,tokens,splits,clustered",
    [
        (32, 8, 8192, 1, False),  # nothing to merge
        (8, 8, 8192, 2, True),
        (1, 8, 4096, 8, True),  # fewer than the 14 of before, and no second kernel
        (1, 8, 131_072, 16, False),  # only 7 clusters of 16, and there are 8 problems
        (1, 1, 20_000, None, False),  # one problem: more splits than a cluster can have
    ],
)
def test_an_h200(
    probe: Path, batch: int, kv_heads: int, tokens: int, splits: int | None, clustered: bool
) -> None:
    got, as_clusters, _ = plan(probe, batch, kv_heads, tokens, CLUSTERS)
    assert as_clusters == clustered
    assert got == splits if splits else got > 16


def test_no_clusters(probe: Path) -> None:
    """Before sm_90, or in a slice of a GPU: the same number of blocks as a kernel that asks for none."""
    for batch, kv_heads, tokens in ((32, 8, 8192), (8, 8, 8192), (1, 8, 131_072), (2, 4, 640)):
        splits, clustered, without = plan(probe, batch, kv_heads, tokens, {})
        assert not clustered and splits == without


def test_clusters_that_take_turns_are_not_chosen(probe: Path) -> None:
    """A device that holds 4 clusters of 8 would need two waves for 8 problems."""
    splits, clustered, _ = plan(probe, 1, 8, 4096, {8: 4})
    assert not clustered and splits > 8
