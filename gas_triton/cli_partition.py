"""The subcommand `partition`: METIS against a random partition, and how many parts to take."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gas_triton.cli_memory import parse_size
from gas_triton.text import readable, table

if TYPE_CHECKING:
    from gas_triton.datasets import Dataset
    from gas_triton.partition_report import PartitionRecord
    from gas_triton.sizing import ModelSize

__all__ = ["add_command", "as_json", "partition_text"]


def _partition(args: argparse.Namespace) -> int:
    from gas_triton.graph import Graph
    from gas_triton.partition_advice import recommend
    from gas_triton.partition_report import check_comparison, compare_partitions
    from gas_triton.sizing import STEP_MODELS
    from gas_triton.training import check_output

    if args.json is not None:
        check_output("--json", args.json)
    budget = None if args.budget is None else parse_size("budget", args.budget)
    dataset = args.load(args)
    model = _model(args, dataset)
    if budget is not None and model.name not in STEP_MODELS:
        raise ValueError(f"model: with a budget expected one of {', '.join(STEP_MODELS)}, got {model.name!r}")
    options: dict[str, Any] = {
        "methods": args.methods, "model": model, "history_dtype": args.history_dtype, "history_tier": args.history_tier,
        "device_type": args.device,
    }  # fmt: skip
    check_comparison(dataset.num_nodes, args.num_parts, args.batch_size, **options)
    print(dataset, flush=True)
    graph = Graph.from_edge_index(dataset.edge_index, num_nodes=dataset.num_nodes)
    records: list[PartitionRecord] = []

    def on_record(record: PartitionRecord) -> None:
        records.append(record)
        if sys.stderr.isatty():
            print(f"{record.parts_asked} parts, {record.method}: {record.seconds:.1f} s", file=sys.stderr)

    label_bytes = 4 * dataset.num_classes if dataset.multi_label else 8
    try:
        compare_partitions(
            graph, args.num_parts, args.batch_size, **options, label_bytes=label_bytes, seed=args.seed,
            on_record=on_record,
        )  # fmt: skip
    except KeyboardInterrupt:
        # what was made so far is shown, and nothing is recommended from a part of it
        if records:
            print(partition_text(records, model))
        raise
    print(partition_text(records, model))
    advice = recommend(records, budget)
    print(advice.reason)
    if args.json is not None:
        given = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float | list)}
        made = {
            "command": "partition", "arguments": given, "dataset": dataset.name, "nodes": dataset.num_nodes,
            "edges": dataset.num_edges, "model": asdict(model), "budget": budget,
        }  # fmt: skip
        found = {"recommended": advice.place, "advice": advice.reason, "records": [as_json(r) for r in records]}
        args.json.write_text(json.dumps({**made, **found}, indent=2) + "\n")
    return 0


def _model(args: argparse.Namespace, dataset: Dataset) -> ModelSize:
    from gas_triton.models import MODELS
    from gas_triton.sizing import ModelSize

    spelling = {name.lower(): name for name in MODELS}
    for name in ("layers", "hidden"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected a positive int, got {getattr(args, name)}")
    if not 0.0 <= args.dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {args.dropout}")
    return ModelSize(
        spelling.get(args.model.lower(), args.model), dataset.num_features, args.hidden, dataset.num_classes,
        args.layers, args.dropout,
    )  # fmt: skip


def as_json(record: PartitionRecord) -> dict[str, Any]:
    """A record for JSON, with the bytes that are derived from its cost."""
    return {**asdict(record), "step_bytes": record.step_bytes, "device_bytes": record.device_bytes}


def partition_text(records: Sequence[PartitionRecord], model: ModelSize) -> str:
    """The table, what its columns mean, and why something is missing."""
    from gas_triton.partition_report import TITLES

    header = [
        "parts", "by", "a batch", "batches", "edge cut", "inter/intra", "balance", "rows", "halo rows", "halo ratio",
        "a step", "device", "seconds",
    ]  # fmt: skip
    lines = []
    for record in records:
        if not record.is_made:
            continue
        parts = str(record.parts_asked)
        if record.num_parts != record.parts_asked:
            parts += f" ({record.num_parts})"
        name = "-" if record.num_parts == 1 else TITLES[record.method]
        lines.append([
            parts, name, str(record.batch_size), str(record.num_batches), f"{record.edge_cut:.1%}",
            f"{record.inter_intra_ratio:.2f}", f"{record.balance:.2f}", f"{record.rows:.0f}", f"{record.halo_rows:.0f}",
            f"{record.halo_ratio:.2f}", readable(record.step_bytes), readable(record.device_bytes),
            f"{record.seconds:.2f}",
        ])  # fmt: skip
    text = [table(header, lines)] if lines else []
    if any(record.is_made and record.num_parts != record.parts_asked for record in records):
        text.append("(n): clusters made; METIS left the others empty.")
    missing = {(TITLES[record.method], record.reason) for record in records if not record.is_made}
    text += [f"not made: {method}: {reason}" for method, reason in sorted(missing)]
    text.append(
        "a batch: clusters. rows: computed in a step, mean. halo rows: out-of-batch neighbours, read from histories.\n"
        "halo ratio: halo rows over rows. inter/intra: edges between batches over edges within. balance: largest "
        "cluster over the mean."
    )
    without = next((record.reason for record in records if record.is_made and record.cost is None), None)
    text.append(
        f"a step: not computed: {without}."
        if without is not None
        else f"a step: bytes that the largest step of {model.name} with {model.layers} layers of {model.hidden} takes, "
        "by arithmetic. device: these, and what stays there."
    )
    return "\n".join(text)


def _clusters(text: str) -> int | float:
    """Clusters of a batch: a count, or a share of them."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def add_command(
    commands: Any,
    data: argparse.ArgumentParser,
    common: argparse.ArgumentParser,
    load: Callable[[argparse.Namespace], Dataset],
    output_path: Callable[[str], Path],
) -> None:
    """Adds `partition` to the subcommands; arguments as of `gas_triton.cli_memory.add_commands`."""
    _clusters.__name__ = "number of clusters"
    partition = commands.add_parser(
        "partition", parents=[data, common], help="compare METIS with a random partition, and say which to take",
        description="Makes partitions by METIS and at random, counts the rows and edges of their batches, computes the "
        "memory of a training step from them, and recommends one: with --budget the largest batches that fit; else "
        "the largest batches that read at most one halo row for a row computed and whose step takes no more than "
        "what stays on the device anyway.",
    )  # fmt: skip
    partition.set_defaults(run=_partition, load=load)
    partition.add_argument("--num-parts", type=int, nargs="+", help="clusters (default: powers of 2 up to 1024)")
    partition.add_argument(
        "--batch-size", type=_clusters, nargs="+", default=[1], metavar="CLUSTERS",
        help="clusters of a batch, or with a point (0.25) a share of them (default: 1)",
    )  # fmt: skip
    partition.add_argument("--methods", nargs="+", default=["metis", "random"], help="default: metis random")
    partition.add_argument("--model", default="gcn", help="gcn, sage, gin or gat (default: %(default)s)")
    partition.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    partition.add_argument("--hidden", type=int, default=64, help="width between layers (default: %(default)s)")
    partition.add_argument("--dropout", type=float, default=0.5, help="on every layer's input (default: %(default)s)")
    partition.add_argument("--history-dtype", default="float32", help="float32, bfloat16, float16 or int8")
    partition.add_argument("--history-tier", default="device", help="device, pinned or file (default: %(default)s)")
    partition.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="whose kernels (default: %(default)s)"
    )
    partition.add_argument("--budget", help="memory of the device that the run may take, such as 8GB or 24GiB")
    partition.add_argument("--json", type=output_path, help="file for the records")
