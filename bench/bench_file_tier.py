"""Memory of a run whose histories lie in files: tables of 4 GB against tables of 4 MB.

Both runs are processes of their own that train one epoch of the same model on a ring with random chords. What they hold
is the anonymous memory of the process (RssAnon of Linux), read all the time; pages of the files themselves are cache,
which the system takes back when it needs room.

    python -m bench.bench_file_tier                both runs and the difference
    pytest bench/bench_file_tier.py                the same as a test, with tables a sixteenth as large
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from bench import groups
from bench.groups import Setting
from bench.tables import OURS, Row
from gas_triton import ClusterLoader, Graph, attach_histories, contiguous_partition
from gas_triton.models import GCN

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

WIDTH, NUM_TABLES = 256, 2
# a row of both tables and its push times
NODE_BYTES = NUM_TABLES * (4 * WIDTH + 4)
CLUSTER_NODES, BATCH_SIZE = 1_000, 2
LARGE, SMALL = 4_000_000_000, 4_000_000
MAX_GROWTH = 1_000_000_000


def anonymous_bytes() -> int:
    """Memory of this process that is not backed by a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon")


class Watch(threading.Thread):
    """Reads `anonymous_bytes` again and again; `peak` is the most it saw."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stopped = 0, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def train(table_bytes: int, folder: str) -> dict[str, float]:
    """One epoch with tables of about `table_bytes` in `folder`."""
    num_nodes = max(table_bytes // NODE_BYTES, 1)
    draw = torch.Generator().manual_seed(0)
    with Watch() as watch:
        node = torch.arange(num_nodes, dtype=torch.int32)
        near = torch.stack([node, (node + 1) % num_nodes])
        far = torch.randint(num_nodes, (2, num_nodes // 10 + 1), generator=draw, dtype=torch.int32)
        graph = Graph.from_edge_index(torch.cat([near, far], dim=1), num_nodes=num_nodes)
        sizes = [CLUSTER_NODES] * (num_nodes // CLUSTER_NODES)
        sizes += [num_nodes - sum(sizes)] if num_nodes > sum(sizes) else []
        parts = contiguous_partition(graph, sizes)
        graph = parts.permute(graph)
        # groups of two are drawn anew each time, so that no plans are kept
        loader = ClusterLoader(graph, parts, BATCH_SIZE, x=torch.randn(num_nodes, 8, generator=draw))
        torch.manual_seed(0)
        model = GCN(8, WIDTH, 4, NUM_TABLES + 1, normalize=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        start = time.perf_counter()
        with attach_histories(model, num_nodes, tier="file", path=folder) as histories:
            for batch in histories.prefetch(loader):
                target = torch.arange(batch.num_nodes) % 4
                F.cross_entropy(model(batch.features, batch), target).backward()
                optimizer.step()
                optimizer.zero_grad()
            stored = sum(int((store.last_push >= 0).sum()) for store in histories.values())
            nbytes = histories.nbytes
    return {
        "nodes": num_nodes,
        "table_bytes": nbytes,
        "rows_stored": stored,
        "peak_anonymous_bytes": watch.peak,
        "seconds": time.perf_counter() - start,
    }


def run_apart(table_bytes: int) -> dict[str, float]:
    """`train` in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="gas_triton-") as folder:
        command = [sys.executable, "-m", "bench.bench_file_tier", "--train", str(table_bytes), "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run with tables of {table_bytes} bytes failed: {done.stderr}")
    return json.loads(done.stdout)


def growth(large: dict[str, float], small: dict[str, float]) -> float:
    """Bytes that the run with large tables held more."""
    assert all(run["rows_stored"] == NUM_TABLES * run["nodes"] for run in (large, small)), "not every row was pushed"
    return large["peak_anonymous_bytes"] - small["peak_anonymous_bytes"]


def measure(setting: Setting) -> list[Row]:
    """A row for the run with large tables, with what it held more, and one for the run with small ones."""
    runs = [run_apart(nbytes) for nbytes in (setting.choose(LARGE, LARGE // 16, 6_000_000), SMALL)]
    rows: list[Row] = [
        {
            "op": "file_tier", "nodes": run["nodes"], "table_mb": run["table_bytes"] / 1e6, "way": OURS,
            "ms": 1e3 * run["seconds"], "anonymous_mb": run["peak_anonymous_bytes"] / 1e6,
        }
        for run in runs
    ]  # fmt: skip
    more = growth(*runs)
    rows[0] |= {"growth_mb": more / 1e6, "target": f"< {MAX_GROWTH / 1e6:.0f} MB more", "met": more < MAX_GROWTH}
    return rows


def test_tables_are_not_in_anonymous_memory(benchmark: BenchmarkFixture) -> None:
    rows = benchmark.pedantic(measure, (Setting(size="quick"),), rounds=1)
    benchmark.extra_info |= {"large": rows[0], "small": rows[1]}
    assert rows[0]["growth_mb"] < MAX_GROWTH / 1e6 / 8


def main() -> None:
    """Prints the bytes, or only trains, in a process of its own for `run_apart`."""
    parser = groups.options(__doc__)
    parser.add_argument("--train", type=int, metavar="BYTES", help="only train, and print JSON")
    parser.add_argument("--folder", help="for the files of --train")
    arguments = parser.parse_args()
    if arguments.train is None:
        groups.main(__doc__, measure, parser)
    else:
        print(json.dumps(train(arguments.train, arguments.folder)))


if __name__ == "__main__":
    main()
