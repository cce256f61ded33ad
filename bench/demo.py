"""The demo: a GCN trained with histories, the same model full-batch, and an MLP that ignores the graph.

    python -m bench.demo

Nothing is kept but the METIS partition, in the cache folder of `gas-triton train`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from gas_triton.cli import cache_folder, progress
from gas_triton.datasets import Dataset, generate
from gas_triton.doctor import device_name
from gas_triton.text import mebibytes, table
from gas_triton.training import Result, TrainConfig, train

SEED = 0
# aggregated features would be a table of both ways that the compared steps do not show
CONFIG = TrainConfig(
    model="GCN", layers=3, hidden=128, dropout=0.0, lr=0.01, grad_norm=1.0, epochs=50, eval_every=5, num_parts=40,
    batch_size=4, seed=SEED, static_first_layer=False,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints its table.

    Args:
        argv: arguments after the program's name; those of the process if None.

    Returns:
        0, or 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except KeyboardInterrupt:
        print("interrupted: no table, because not all models were trained")
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    start = time.perf_counter()
    print(f"Drawing a graph of {args.nodes} nodes and {args.edges} edges ...", flush=True)
    dataset = generate(args.nodes, args.edges, seed=SEED)
    print(dataset, flush=True)
    config = replace(CONFIG, epochs=args.epochs)
    full_batch = replace(config, full_batch=True)
    # It is at its best after about twenty epochs, and then learns its training nodes by heart.
    mlp = replace(full_batch, partition="random", epochs=min(args.epochs, 30))
    runs = {"histories": (dataset, config), "full-batch": (dataset, full_batch), "MLP": (without_edges(dataset), mlp)}
    results: dict[str, Result] = {}
    for name, (data, settings) in runs.items():
        with progress(settings.epochs, label=f"{name:10}") as on_epoch:
            results[name] = train(data, settings, on_epoch, device=device, cache=cache_folder())
        if results[name].interrupted:
            raise KeyboardInterrupt
    print(f"\n{summary(results, config)}")
    cores = f" (threads: {torch.get_num_threads()})" if device.type == "cpu" else ""
    print(f"\nOn {device_name(device)}{cores}, seed {SEED}, in {time.perf_counter() - start:.0f} s.")


def without_edges(dataset: Dataset) -> Dataset:
    """The same nodes alone: on them, a GCN is an MLP."""
    return replace(dataset, edge_index=dataset.edge_index[:, :0])


def summary(results: dict[str, Result], config: TrainConfig) -> str:
    """The table, and two lines on how to read it.

    Args:
        results: of "histories", "full-batch" and "MLP", each with an evaluated epoch.
        config: what they have in common.
    """
    rows = []
    for name, result in results.items():
        assert result.test_acc is not None
        assert result.peak_bytes is not None
        costs = [mebibytes(result.peak_bytes), mebibytes(result.history_bytes or 0), f"{result.epoch_seconds:.3f} s"]
        rows.append([name, f"{result.test_acc:.2%}", *(costs if name != "MLP" else ["", "", ""])])
    header = [f"{config.layers} layers, {config.hidden} wide", "test accuracy", "peak of a step", "histories", "epoch"]
    steps = -(-config.num_parts // config.batch_size)
    return f"""{table(header, rows)}

Peak of a step: memory on top of the graph, features and parameters. With histories, a step computes 1/{steps} of the
nodes and reads the other rows that it needs from the tables, so its memory does not grow with the graph.
Test accuracy: at the best validation epoch of {config.epochs}; an epoch is {steps} steps with histories and one
full-batch, and no edge is dropped in either. The MLP sees no edges: what it lacks is what the graph is worth."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description="Histories against full-batch training.")
    parser.add_argument("--nodes", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--edges", type=int, default=2_000_000, help="directed edges (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
