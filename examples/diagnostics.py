"""How good is the approximation? A walk through what `gas.diagnose` shows, and what to do about it.

    python examples/diagnostics.py --figure diagnosis.png

It prints the tables of a run with random clusters, and a line each of five settings, here shortened:

    random, 1 cluster of 20: history rows 52% off at worst, 10 steps old (median), output 52% off, cosine 0.170
    METIS, 1 of 20: history rows 23% off at worst, 10 steps old (median), output 5% off, cosine 0.906
    METIS, 5 of 20: history rows 15% off at worst, 2 steps old (median), output 5.9% off, cosine 0.943
    METIS, 5 of 20, learning rate 0.001: history rows 9.9% off at worst, output 2.5% off, cosine 0.990
    METIS, 5 of 20, Lipschitz penalty: history rows 14% off at worst, output 4.8% off, cosine 0.970
"""

import argparse

import torch
import torch.nn.functional as F

import gas_triton as gas
from gas_triton.regularization import LipschitzPenalty

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--nodes", type=int, default=10_000, help="of the generated graph")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--figure", help="a .png, .svg or .pdf to draw; needs matplotlib")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

data = gas.datasets.generate(num_nodes=args.nodes, num_edges=10 * args.nodes)
structure = gas.Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes)


def loss_of(out: torch.Tensor, batch: gas.Batch) -> torch.Tensor:
    """The sum over the training nodes of a batch: those of all batches add up to that of the whole graph."""
    return F.cross_entropy(out[batch.train_mask], batch.y[batch.train_mask], reduction="sum")


def train_and_diagnose(
    parts: gas.Partition, batch_size: int, lr: float = 0.005, strength: float = 0.0
) -> gas.diagnostics.Diagnosis:
    """Trains a four-layer GCN on the batches of a partition, then measures what its histories do to it."""
    torch.manual_seed(0)
    graph, x, y, train_mask = parts.permute(structure, data.x, data.y, data.train_mask)
    graph = gas.models.GCN.prepare(graph).to(args.device)
    x, y, train_mask = (value.to(args.device) for value in (x, y, train_mask))
    loader = gas.ClusterLoader(graph, parts, batch_size, x=x, y=y, train_mask=train_mask)
    model = gas.models.GCN(data.num_features, 64, data.num_classes, num_layers=4).to(args.device)
    histories = gas.attach_histories(model, graph.num_nodes)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with LipschitzPenalty(model, strength) as penalty:
        for _ in range(args.epochs):
            model.train()
            for batch in histories.prefetch(loader):
                loss = loss_of(model(batch.x, batch), batch) / train_mask.sum() * len(loader)
                (loss + penalty()).backward()
                optimizer.step()
                optimizer.zero_grad()
    # Changes nothing, so it may stand anywhere in a training loop. The loss is for the gradients, and takes the memory
    # of a full-batch step: leave it out where that does not fit.
    return gas.diagnose(model, loader, loss=loss_of)


metis = gas.metis(structure, num_parts=20)
random = gas.random_partition(structure, num_parts=20)

# The hard way first: clusters at random, one in a batch, so that nearly every neighbour is in the halo.
diagnosis = train_and_diagnose(random, batch_size=1)
print(diagnosis.table())
if args.figure:
    diagnosis.plot(args.figure, "random clusters, one in a batch")
    print(f"\nfigure: {args.figure}")

# What to look for, and what to do about it:
#
# age            Steps since a pulled row was pushed: half an epoch in the median, an epoch at most. More than that,
#                or rows `never` pushed: epochs skip clusters. Fewer, larger batches lower the age.
# pulled off     How far pulled rows are from exact ones. It grows from layer to layer, with the age and with the
#                learning rate: what counts is how far the weights have moved since a row was pushed.
# computed off   How far the rows computed with them are, where in-batch neighbours thin the error. It sits at the
#                border of a batch: METIS makes fewer such rows, larger batches have more rows far from it.
# k own, k nbrs  Lipschitz constants: how much a layer may amplify an error. LipschitzPenalty lowers them.
# bound          What the `error` can be at most by these constants, node by node. Theorem 2 takes the worst of all.
# cosine         Between the gradient of all batches and that of the whole graph: what flows through the halo is lost.
#                METIS and larger batches keep more of it. gas.Compensated computes it while training, and makes
#                halo rows fresher; what is measured here is the model without it.
#
# Larger batches take fewer steps in as many epochs, so their weights are earlier in training and move faster: compare
# the cosine and the bound of the second and the third, less their output.
settings = {
    "random, 1 cluster of 20": diagnosis,
    "METIS, 1 of 20": train_and_diagnose(metis, batch_size=1),
    "METIS, 5 of 20": train_and_diagnose(metis, batch_size=5),
    "METIS, 5 of 20, learning rate 0.001": train_and_diagnose(metis, batch_size=5, lr=0.001),
    "METIS, 5 of 20, Lipschitz penalty": train_and_diagnose(metis, batch_size=5, strength=1.0),
}
print()
for name, found in settings.items():
    print(f"{name}: {found.line()}, cosine {found.gradients[-1].cosine:.3f}")
