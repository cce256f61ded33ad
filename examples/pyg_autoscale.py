"""A model written in PyTorch Geometric, scaled by one line, beside the same model as PyG runs it on the whole graph.

    python examples/pyg_autoscale.py

It needs torch_geometric, and prints, before and after training,

    test accuracy 6.30%, of PyG 6.30%; largest relative difference of a logit 3.0e-07
    test accuracy 44.12%, of PyG 44.12%; largest relative difference of a logit 2.0e-07
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch_geometric.nn import GATConv, GraphConv

import gas_triton as gas

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--nodes", type=int, default=20_000, help="of the generated graph")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()
torch.manual_seed(0)


class Net(torch.nn.Module):
    """Nothing in here knows of histories."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = GATConv(in_channels, hidden_channels // 4, heads=4)
        self.conv2 = GraphConv(hidden_channels, hidden_channels)
        self.conv3 = GraphConv(hidden_channels, out_channels)

    def forward(self, x, edge_index):
        x = self.conv1(x, edge_index).relu()
        x = self.conv2(x, edge_index).relu()
        return self.conv3(x, edge_index)


data = gas.datasets.generate(num_nodes=args.nodes, num_edges=10 * args.nodes)
model = Net(data.num_features, 64, data.num_classes)
theirs = copy.deepcopy(model)

graph = gas.Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes)
parts = gas.metis(graph, num_parts=20)
graph, x, y, train_mask, test_mask = parts.permute(graph, data.x, data.y, data.train_mask, data.test_mask)
graph, x, y, train_mask, test_mask = (value.to(args.device) for value in (graph, x, y, train_mask, test_mask))
loader = gas.ClusterLoader(graph, parts, batch_size=5, x=x, y=y, train_mask=train_mask)

# The line. Layers with a counterpart in gas_triton.nn become it (GATConv), others are called as they are (GraphConv).
model = gas.autoscale(model.to(args.device))
print(model)
histories = gas.attach_histories(model, graph.num_nodes)


def compare() -> None:
    """The logits of all nodes, batch by batch and by PyG on the whole graph, with the same weights."""
    theirs.load_state_dict(model.state_dict())  # parameters have kept their names
    theirs.eval()
    ours = gas.inference(model, loader)
    with torch.no_grad():
        # `permute` has put the rows in another order: row i is node parts.perm[i] of the data.
        whole = theirs(data.x, data.edge_index)[parts.perm].to(args.device)
    test = [(out.argmax(dim=1) == y)[test_mask].float().mean().item() for out in (ours, whole)]
    difference = ((ours - whole).abs().max() / whole.abs().max()).item()
    print(f"test accuracy {test[0]:.2%}, of PyG {test[1]:.2%}; largest relative difference of a logit {difference:.1e}")


compare()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for epoch in range(1, args.epochs + 1):
    model.train()
    for batch in histories.prefetch(loader):
        out = model(batch.x, batch)  # the batch goes where edge_index went
        loss = F.cross_entropy(out[batch.train_mask], batch.y[batch.train_mask])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch:2d}  loss {loss.item():.3f}")
compare()
