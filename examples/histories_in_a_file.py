"""Histories in memory-mapped files: tables larger than memory, with the rows of the next batch fetched ahead.

    python examples/histories_in_a_file.py
    python examples/histories_in_a_file.py --nodes 1000000 --dtype int8 --folder /mnt/nvme/histories

It prints a table of the histories, and

    a step takes 100.5 MiB, the tables 98.4 MiB of disk
    pulled 979 MiB in 80 pulls, of which 0 came late
    pushed 488 MiB in 80 pushes
    pulls took 1.06 s, of which 1.06 s were waited for
    test accuracy 60.91%

With more nodes and as many more parts, tables grow and steps do not.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import gas_triton as gas
from gas_triton.memory import peak_bytes
from gas_triton.nn import SAGEConv

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--nodes", type=int, default=100_000, help="of the generated graph")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the rows in the files")
parser.add_argument("--folder", help="a new one for the files, on a fast local disk (default: temporary)")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()
torch.manual_seed(0)


class SAGE(torch.nn.Module):
    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = SAGEConv(in_channels, hidden_channels)
        self.conv2 = SAGEConv(hidden_channels, hidden_channels)
        self.conv3 = SAGEConv(hidden_channels, out_channels)

    def forward(self, x: torch.Tensor, batch: gas.Batch) -> torch.Tensor:
        h = self.conv1(x, batch).relu()
        h = self.conv2(h, batch).relu()
        return self.conv3(h, batch)


data = gas.datasets.generate(num_nodes=args.nodes, num_edges=10 * args.nodes)
graph = gas.Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes)
parts = gas.metis(graph, num_parts=40)
graph, x, y, train_mask, test_mask = parts.permute(graph, data.x, data.y, data.train_mask, data.test_mask)
graph, x, y, train_mask, test_mask = (value.to(args.device) for value in (graph, x, y, train_mask, test_mask))
loader = gas.ClusterLoader(graph, parts, batch_size=5, x=x, y=y, train_mask=train_mask)
model = SAGE(data.num_features, 256, data.num_classes).to(args.device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.005)


def train_step(batch: gas.Batch) -> torch.Tensor:
    optimizer.zero_grad()
    out = model(batch.features, batch)
    loss = F.cross_entropy(out[batch.train_mask], batch.y[batch.train_mask])
    loss.backward()
    return loss.detach()


folder = Path(args.folder or tempfile.mkdtemp(prefix="histories-"))
# A folder belongs to one process. Leaving the block flushes and gives it free; reopen=True would go on with its tables.
with gas.attach_histories(model, graph.num_nodes, tier="file", dtype=DTYPES[args.dtype], path=folder) as histories:
    print(histories.summary())
    with peak_bytes(args.device) as peak:
        train_step(next(loader.in_order()))
    print(f"a step takes {peak.nbytes / 2**20:.1f} MiB, the tables {histories.nbytes / 2**20:.1f} MiB of disk")
    histories.reset()
    histories.reset_stats()

    for epoch in range(1, args.epochs + 1):
        model.train()
        # order="stale" would fetch rows one step earlier: more time for the disk, some rows one step older.
        for batch in histories.prefetch(loader, depth=1, order="strict"):
            loss = train_step(batch)
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}", flush=True)

    stats = histories.transfer_stats()
    print(
        f"pulled {stats['pull_bytes'] / 2**20:.0f} MiB in {stats['pulls']} pulls, of which {stats['misses']} came late"
    )
    print(f"pushed {stats['push_bytes'] / 2**20:.0f} MiB in {stats['pushes']} pushes")
    # With a GPU, pulls run beside the steps on a stream of their own; on a CPU all of their time is exposed.
    print(f"pulls took {stats['pull_seconds']:.2f} s, of which {stats['exposed_seconds']:.2f} s were waited for")

is_right = gas.inference(model, loader).argmax(dim=1) == y
print(f"test accuracy {is_right[test_mask].float().mean():.2%}")
print(f"the files are in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
