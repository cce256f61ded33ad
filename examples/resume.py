"""A run that is stopped and resumed gives the numbers of one that was not, bit for bit.

    python examples/resume.py

It prints the loss of every epoch of three runs: without a break, until the middle, and from there on. The tenth is
1.114174 in both that get there, and then comes

    equal bit for bit: True
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import gas_triton as gas
from gas_triton.nn import GCNConv

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--nodes", type=int, default=20_000, help="of the generated graph")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--folder", help="a new one for the checkpoint (default: temporary)")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()


class GCN(torch.nn.Module):
    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = GCNConv(in_channels, hidden_channels)
        self.conv2 = GCNConv(hidden_channels, hidden_channels, input_dropout=0.5)
        self.conv3 = GCNConv(hidden_channels, out_channels, input_dropout=0.5)

    def forward(self, x: torch.Tensor, batch: gas.Batch) -> torch.Tensor:
        h = self.conv1(x, batch).relu()
        h = self.conv2(h, batch).relu()
        return self.conv3(h, batch)


data = gas.datasets.generate(num_nodes=args.nodes, num_edges=10 * args.nodes)
graph = gas.Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes).add_self_loops().gcn_norm()
# The same seed gives the same partition. With `cache=`, METIS runs once for all runs.
parts = gas.metis(graph, num_parts=20, seed=0)
graph, x, y, train_mask = parts.permute(graph, data.x, data.y, data.train_mask)
graph, x, y, train_mask = (value.to(args.device) for value in (graph, x, y, train_mask))


def train(epochs: int, folder: Path | None = None) -> torch.Tensor:
    """Trains until `epochs` are done, from the checkpoint in `folder` if there is one, and returns the logits."""
    torch.manual_seed(0)
    loader = gas.ClusterLoader(graph, parts, batch_size=5, x=x, y=y, train_mask=train_mask)
    model = GCN(data.num_features, 64, data.num_classes).to(args.device)
    histories = gas.attach_histories(model, graph.num_nodes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if folder is not None and folder.exists():
        # Tables go into the histories in place. With the graph, rows in another order are refused.
        state = gas.load_checkpoint(folder, histories, graph)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.epoch = state["epoch"]  # the order of the batches comes from the seed and the epoch
        torch.set_rng_state(state["generator"])  # dropout
        if "device_generator" in state:
            torch.cuda.set_rng_state(state["device_generator"], args.device)
        print(f"  resumed after epoch {loader.epoch}")

    while loader.epoch < epochs:
        model.train()
        for batch in histories.prefetch(loader):
            out = model(batch.features, batch)
            loss = F.cross_entropy(out[batch.train_mask], batch.y[batch.train_mask])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"  epoch {loader.epoch:2d}  loss {loss.item():.6f}")
        if folder is not None:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": loader.epoch,
                "generator": torch.get_rng_state(),
            }
            if x.is_cuda:
                state["device_generator"] = torch.cuda.get_rng_state(args.device)
            # Killed at any moment, this leaves the checkpoint before it or the new one.
            gas.save_checkpoint(folder, state, histories)
    return gas.inference(model, loader)


folder = Path(args.folder or tempfile.mkdtemp(prefix="resume-")) / "checkpoint"
if folder.exists():
    parser.error(f"--folder: {folder} is of another run; delete it, or name another folder")
print("without a break")
whole = train(args.epochs)
print("stopped in the middle")
train(args.epochs // 2, folder)
print("and resumed, with a new model, optimizer, loader and histories")
resumed = train(args.epochs, folder)
print(f"equal bit for bit: {torch.equal(whole, resumed)}")
