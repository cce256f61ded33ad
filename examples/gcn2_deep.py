"""GCNII with 64 layers on Cora: the memory of a deep model, full-batch and with histories.

    python examples/gcn2_deep.py                 # downloads Cora through torch_geometric
    python examples/gcn2_deep.py --root data --layers 16 --epochs 100

It prints

    full-batch step        88.7 MiB
    step with histories    22.4 MiB: 4.0 times less
    tables of histories    42.3 MiB, in host memory or files if you like (tier=)
    test accuracy 83.20%, at the best of validation (81.20%)

A step takes what one of four batches needs; with --batch-size 4 (of 40 clusters) it takes 9.1 MiB.
"""

import argparse
import time

import torch
import torch.nn.functional as F

import gas_triton as gas
from gas_triton.memory import peak_bytes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", help="folder with Cora.npz (default: $GAS_TRITON_DATA, else a download)")
parser.add_argument("--layers", type=int, default=64)
parser.add_argument("--epochs", type=int, default=200)
parser.add_argument("--num-parts", type=int, default=40)
parser.add_argument("--batch-size", type=int, default=10)
parser.add_argument("--eval-every", type=int, default=20)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()
torch.manual_seed(0)

data = gas.datasets.load("Cora", args.root)
graph = gas.Graph.from_edge_index(data.edge_index, num_nodes=data.num_nodes)
parts = gas.metis(graph, args.num_parts)
graph, x, y, *masks = parts.permute(graph, data.x, data.y, data.train_mask, data.val_mask, data.test_mask)
# A model of the library knows what its layers expect of the graph: here self loops and the GCN normalisation.
graph = gas.models.GCN2.prepare(graph).to(args.device)
y, train_mask, val_mask, test_mask = (value.to(args.device) for value in (y, *masks))
x = gas.SparseRows.of(x).to(args.device)
loader = gas.ClusterLoader(graph, parts, args.batch_size, x=x, y=y, train_mask=train_mask)

model = gas.models.GCN2(data.num_features, 64, data.num_classes, args.layers, alpha=0.1, theta=0.5, dropout=0.6)
model = model.to(args.device)
histories = gas.attach_histories(model, graph.num_nodes)
optimizer = torch.optim.Adam(
    [
        {"params": model.reg_parameters, "weight_decay": 0.01},  # the layers
        {"params": model.nonreg_parameters, "weight_decay": 5e-4},  # the linear layers at both ends
    ],
    lr=0.01,
)


mean_labelled = int(train_mask.sum()) / len(loader)


def train_step(batch: gas.Batch) -> torch.Tensor:
    optimizer.zero_grad()
    out = model(batch.x, batch)
    # A sum over a constant: the mean of a batch without training nodes would be NaN.
    loss = F.cross_entropy(out[batch.train_mask], batch.y[batch.train_mask], reduction="sum") / mean_labelled
    loss.backward()
    return loss.detach()


# The same model and the same code full-batch: a batch that is the whole graph has no halo and reads no history.
with peak_bytes(args.device) as full:
    train_step(loader.full())
with peak_bytes(args.device) as one:
    train_step(next(loader.in_order()))
histories.reset()  # what these two steps pushed
mib = 2**20
print(f"{args.layers} layers, {data.num_nodes} nodes, {len(loader)} batches an epoch")
print(f"full-batch step      {full.nbytes / mib:6.1f} MiB")
print(f"step with histories  {one.nbytes / mib:6.1f} MiB: {full.nbytes / one.nbytes:.1f} times less")
print(
    f"tables of histories  {histories.nbytes / mib:6.1f} MiB, in host memory or files if you like (tier=)", flush=True
)

begin = time.perf_counter()
best_val = best_test = 0.0
for epoch in range(1, args.epochs + 1):
    model.train()
    total = torch.zeros((), device=args.device)
    for batch in histories.prefetch(loader):
        total += train_step(batch)
        optimizer.step()
    if epoch % args.eval_every and epoch != args.epochs:
        continue
    is_right = gas.inference(model, loader).argmax(dim=1) == y
    val, test = (is_right[mask].float().mean().item() for mask in (val_mask, test_mask))
    if val > best_val:
        best_val, best_test = val, test
    seconds = time.perf_counter() - begin
    print(
        f"epoch {epoch:3d}  loss {total.item() / len(loader):.3f}  val {val:.2%}  test {test:.2%}  {seconds:.0f} s",
        flush=True,
    )
print(f"test accuracy {best_test:.2%}, at the best of validation ({best_val:.2%})")
