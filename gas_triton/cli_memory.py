"""The subcommands `memory`, which measures what a training step takes, and `plan`, which computes it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gas_triton.text import readable, table

if TYPE_CHECKING:
    from gas_triton.datasets import Dataset
    from gas_triton.memory_table import Row
    from gas_triton.sizing import Budget, Candidate, ModelSize, Problem

__all__ = ["add_commands", "parse_size"]

# Nodes and edges of the generated graph that is measured unless another is asked for: about a minute.
DEFAULT_SIZE = 50_000, 1_000_000
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(name: str, text: str) -> int:
    """Bytes of a size such as 80GB (decimal), 24GiB (binary) or 512M.

    Raises:
        ValueError: another text, one without a unit, or no bytes at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)B?", text.strip().upper())
    nbytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if nbytes < 1:
        raise ValueError(f"{name}: expected a size such as 80GB or 24GiB, got {text!r}")
    return nbytes


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(args: argparse.Namespace) -> int:
    import torch

    from gas_triton.cli import cache_folder
    from gas_triton.doctor import versions
    from gas_triton.memory_plot import check_matplotlib, plot_memory
    from gas_triton.memory_table import check_arguments, compare_memory
    from gas_triton.models import MODELS
    from gas_triton.training import check_output, find_device

    for flag, file in (("--json", args.json), ("--plot", args.plot)):
        if file is not None:
            check_output(flag, file)
    if args.plot is not None:
        check_matplotlib(args.plot)
    spelling = {name.lower(): name for name in MODELS}
    models = [spelling.get(name.lower(), name) for name in args.model]
    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = dict(
        models=models, layers=args.layers, hidden=args.hidden, batch_sizes=args.batch_size, num_parts=args.num_parts,
        partition=args.partition, dropout=args.dropout, history_dtype=args.history_dtype, neighbors=args.neighbors,
        seeds=args.seeds, steps=args.steps,
    )  # fmt: skip
    check_arguments(args.ways, **options)
    if args.dataset is None:
        args.dataset = "generated"
        if args.nodes is None and args.edges is None:
            args.nodes, args.edges = DEFAULT_SIZE
    dataset = args.load(args)
    print(dataset, flush=True)
    rows = compare_memory(
        dataset, args.ways, **options, device=device, seed=args.seed, cache=None if args.no_cache else cache_folder(),
        on_row=lambda row: _progress(row, args.quiet),
    )  # fmt: skip
    print(memory_text(rows))
    if args.json is not None:
        given = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float | list)}
        made = {
            "command": "memory",
            "arguments": given,
            "dataset": dataset.name,
            "nodes": dataset.num_nodes,
            "edges": dataset.num_edges,
        }
        args.json.write_text(
            json.dumps({**made, "versions": versions(device), "rows": [as_record(row) for row in rows]}, indent=2)
            + "\n"
        )
    if args.plot is not None:
        plot_memory(rows, args.plot, f"{dataset.name}: {dataset.num_nodes:,} nodes, {dataset.num_edges:,} edges")
    return 0


def as_record(row: Row) -> dict[str, Any]:
    """A row for JSON, with what is derived from it."""
    off = None if not (row.predicted_bytes and row.step_bytes) else row.predicted_bytes / row.step_bytes - 1
    return {**asdict(row), "predicted_off": off, "device_bytes": row.device_bytes, "host_bytes": row.host_bytes}


def _progress(row: Row, quiet: bool) -> None:
    if not quiet and sys.stderr.isatty():
        print(f"{row.way}, {row.layers} layers, {row.hidden} wide: {row.seconds:.1f} s", file=sys.stderr)


def memory_text(rows: Sequence[Row]) -> str:
    """The table, what its columns mean, and why ways are missing."""
    from gas_triton.memory_table import WAYS

    header = [
        "way", "model", "layers", "hidden", "batch", "rows", "halo", "a step", "arithmetic", "off", "stays: model",
        "graph", "features", "histories", "device in all", "data used",
    ]  # fmt: skip
    lines = []
    for row in rows:
        if row.reason:
            continue
        off = (
            "-"
            if row.predicted_bytes is None or not row.step_bytes
            else f"{row.predicted_bytes / row.step_bytes - 1:+.1%}"
        )
        on_host = " (host)" if row.way == "sampling" else ""
        tables = (
            "-" if not row.history_tier else readable(row.history_bytes) + " (host)" * (row.history_tier == "pinned")
        )
        lines.append([
            WAYS[row.way], row.model, str(row.layers), str(row.hidden), str(row.batch_size or "-"), str(row.nodes),
            str(row.halo), readable(row.step_bytes), readable(row.predicted_bytes), off, readable(row.state_bytes),
            readable(row.graph_bytes) + on_host, readable(row.feature_bytes) + on_host, tables,
            readable(row.device_bytes + (row.step_bytes or 0)),
            "-" if row.edges_used is None else f"{row.edges_used:.1%}",
        ])  # fmt: skip
    steps = max((row.steps for row in rows), default=0)
    text = [table(header, lines)] if lines else []
    reasons = {(WAYS[row.way], row.model, row.reason) for row in rows if row.reason}
    text += [f"not measured: {way}, {model}: {reason}" for way, model, reason in sorted(reasons)]
    text.append(
        f"a step: most bytes at once beyond what stays, in {steps} steps (plan, forward, backward, Adam).\n"
        "data used: edges of the receptive field that a step uses; histories stand for what is behind them.\n"
        "batch: clusters. Sampling trains on as many training nodes as a batch of clusters has on average."
    )
    return "\n".join(text)


# --- plan -------------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> int:
    from gas_triton.sizing import STEP_MODELS, Budget, ModelSize, candidates, fit
    from gas_triton.training import check_output

    if args.json is not None:
        check_output("--json", args.json)
    spelling = {name.lower(): name for name in STEP_MODELS}
    if args.model.lower() not in spelling:
        raise ValueError(f"model: expected one of {', '.join(STEP_MODELS)}, got {args.model!r}")
    budget = Budget(
        parse_size("budget", args.budget), parse_size("host", args.host),
        None if args.disk is None else parse_size("disk", args.disk),
    )  # fmt: skip
    problem = _problem(args)
    model = ModelSize(
        spelling[args.model.lower()], problem.num_features, args.hidden, problem.num_classes, args.layers, args.dropout
    )
    for name in ("hidden", "layers", "batch_size", *(("num_parts",) if args.num_parts else ())):
        for count in getattr(args, name) if name == "num_parts" else [getattr(args, name)]:
            if count < 1:
                raise ValueError(f"{name}: expected a positive int, got {count}")
    options: dict[str, Any] = {"batch_size": args.batch_size, "device_type": args.device}
    if args.num_parts:
        options["num_parts"] = args.num_parts
    found = list(candidates(problem, model, budget, history_dtypes=args.history_dtype, **options))
    if not found:
        raise ValueError(
            f"num_parts: expected 1, or more than batch_size ({args.batch_size}) and at most the nodes "
            f"({problem.num_nodes}), got {', '.join(map(str, args.num_parts))}"
        )
    best = fit(found)
    print(_plan_text(found))
    print(
        f"Assumed: {problem.halo_ratio:g} halo rows for every row computed (--halo-ratio; `gas-triton partition` "
        "measures it), edges spread evenly."
    )
    advice = _advice(best, problem, model, args) if best is not None else _what_would_fit(problem, model, budget, found)
    print(advice)
    if args.json is not None:
        rows = [{**asdict(c), "device": c.device, "host": c.host, "disk": c.disk} for c in found]
        made = {"problem": asdict(problem), "model": asdict(model), "budget": asdict(budget), "advice": advice}
        chosen = None if best is None else found.index(best)
        args.json.write_text(json.dumps({**made, "best": chosen, "candidates": rows}, indent=2) + "\n")
    return 0


def _problem(args: argparse.Namespace) -> Problem:
    from gas_triton.datasets import load
    from gas_triton.sizing import Problem

    if args.dataset is None:
        missing = [name for name in ("nodes", "edges", "features", "classes") if getattr(args, name) is None]
        if missing:
            raise ValueError(
                f"{missing[0]}: expected --{', --'.join(missing)}, or --dataset to read them from, got none"
            )
        return Problem(args.nodes, args.edges, args.features, args.classes, args.halo_ratio)
    dataset = load(args.dataset, args.root)
    sizes = {
        "num_nodes": args.nodes or dataset.num_nodes, "num_edges": args.edges or dataset.num_edges,
        "num_features": args.features or dataset.num_features, "num_classes": args.classes or dataset.num_classes,
    }  # fmt: skip
    return Problem(**sizes, halo_ratio=args.halo_ratio)


def _plan_text(found: Sequence[Candidate]) -> str:
    header = [
        "tier", "parts", "batch", "dtype", "rows", "halo", "model+Adam", "graph", "plans", "features", "histories",
        "slots", "a step", "device", "host", "disk", "fits",
    ]  # fmt: skip
    rows = [
        [c.tier, str(c.num_parts), str(c.batch_size), c.history_dtype, str(c.batch.nodes), str(c.batch.halo),
         *map(readable, (c.state, c.graph, c.plans, c.features, c.histories, c.slots, c.step)),
         *map(readable, (c.device, c.host, c.disk)),
         "yes" if c.fits else f"no: {c.reason}"]
        for c in found
    ]  # fmt: skip
    return table(header, rows)


def _advice(best: Candidate, problem: Problem, model: ModelSize, args: argparse.Namespace) -> str:
    command = [
        "gas-triton train", f"--dataset {args.dataset or 'YOURS'}", f"--model {model.name.lower()}",
        f"--layers {model.layers}", f"--hidden {model.hidden}", f"--dropout {model.dropout:g}",
    ]  # fmt: skip
    if best.tier == "full-batch":
        how = "The whole graph fits: train full-batch, without histories"
        command.append("--full-batch")
    else:
        how = f"Histories {_where(best)} in {best.history_dtype}, {best.num_parts} parts, {best.batch_size} a batch"
        command += [
            f"--num-parts {best.num_parts}", f"--batch-size {best.batch_size}", f"--history-tier {best.tier}",
            f"--history-dtype {best.history_dtype}",
        ]  # fmt: skip
    where = ", ".join(
        f"{readable(nbytes)} on the {name}" for name, nbytes in
        (("device", best.device), ("host", best.host), ("disk", best.disk)) if nbytes
    )  # fmt: skip
    return f"{how}: {where}.\n  {' '.join(command)}"


def _what_would_fit(problem: Problem, model: ModelSize, budget: Budget, found: Sequence[Candidate]) -> str:
    """What more parts, narrower tables or files would do."""
    from gas_triton.sizing import HISTORY_BYTES, candidates, fit

    more = [parts for power in range(16) if (parts := 10 * 2**power) <= max(10, problem.num_nodes // 16)]
    wider = replace(budget, disk=2**62)
    for dtypes in (["float32"], list(HISTORY_BYTES)):
        for size in (1, 2):
            # batches of two clusters are planned anew, so that no plans are kept
            best = fit(list(candidates(problem, model, wider, num_parts=more, batch_size=size, history_dtypes=dtypes)))
            if best is not None:
                return (
                    f"Nothing here fits. What would: --num-parts {best.num_parts} --batch-size {best.batch_size} "
                    f"--history-dtype {best.history_dtype} and histories {_where(best)}: {readable(best.device)} on "
                    f"the device, {readable(best.host)} on the host, {readable(best.disk)} on the disk."
                )
    found = list(candidates(problem, model, wider, num_parts=more, batch_size=2))
    least = min(found, key=lambda c: c.device)
    text = (
        f"Nothing here fits, and more parts, int8 or files would not help: the least is {readable(least.device)} on "
        f"the device, of which the graph takes {readable(least.graph)} and the features {readable(least.features)}."
    )
    return f"{text}\n{_features_on_host(found, problem, budget)}"


def _features_on_host(found: Sequence[Candidate], problem: Problem, budget: Budget) -> str:
    """What it takes with the features on the host, of which each batch copies its rows, one batch ahead."""
    from gas_triton.sizing import DEVICE_SHARE, HOST_SHARE

    row = 4 * problem.num_features
    moved = [
        (c.device + 2 * row * (c.batch.nodes + c.batch.halo) - row * problem.num_nodes,
         c.host + row * problem.num_nodes, c)
        for c in found
    ]  # fmt: skip
    fitting = [way for way in moved if way[0] <= DEVICE_SHARE * budget.device]
    if not fitting:
        least = min(device for device, _, _ in moved)
        return f"Nor would features on the host (gas-triton train --host-features): about {readable(least)} are left."
    in_host = [way for way in fitting if way[1] <= HOST_SHARE * budget.host]
    # the least host memory where there is too little
    device, host, best = in_host[0] if in_host else min(fitting, key=lambda way: way[1])
    return (
        f"What would: gas-triton train --host-features, --num-parts {best.num_parts} --batch-size {best.batch_size} "
        f"--history-dtype {best.history_dtype} and histories {_where(best)}: about {readable(device)} on the device, "
        f"{readable(host)} on the host{'' if in_host else ' (more than --host)'}, {readable(best.disk)} on the disk."
    )


def _where(candidate: Candidate) -> str:
    return {"device": "on the device", "pinned": "in pinned memory", "file": "in files"}[candidate.tier]


# --- parsers ----------------------------------------------------------------------------------------------------------


def add_commands(
    commands: Any,
    data: argparse.ArgumentParser,
    common: argparse.ArgumentParser,
    load: Callable[[argparse.Namespace], Dataset],
    output_path: Callable[[str], Path],
) -> None:
    """Adds `memory` and `plan` to the subcommands.

    Args:
        commands: subparsers.
        data: arguments that name a dataset.
        common: arguments of all subcommands.
        load: gives the dataset that `data` names.
        output_path: type of arguments that name a file.
    """
    memory = commands.add_parser(
        "memory", parents=[data, common], help="measure the memory of a training step",
        description="Measures the memory of a training step, way by way; without --dataset on a generated graph of "
        f"{DEFAULT_SIZE[0]} nodes and {DEFAULT_SIZE[1]} edges.",
    )  # fmt: skip
    memory.set_defaults(run=_memory, load=load)
    memory.add_argument(
        "--ways", nargs="+", metavar="WAY", default=["full", "full-pyg", "histories", "pinned", "cluster", "sampling"],
        help="full, full-pyg, histories, pinned, pinned-in-place, cluster, sampling "
        "(default: all but pinned-in-place)",
    )  # fmt: skip
    memory.add_argument("--model", nargs="+", default=["gcn"], help="names of gas_triton.models (default: gcn)")
    memory.add_argument("--layers", type=int, nargs="+", default=[2, 3, 4], help="default: 2 3 4")
    memory.add_argument("--hidden", type=int, nargs="+", default=[64], help="widths between layers (default: 64)")
    memory.add_argument("--batch-size", type=int, nargs="+", default=[1], help="clusters of a batch (default: 1)")
    memory.add_argument("--num-parts", type=int, default=40, help="clusters (default: %(default)s)")
    memory.add_argument("--partition", default="metis", help="metis, random or contiguous (default: %(default)s)")
    memory.add_argument("--dropout", type=float, default=0.5, help="on every layer's input (default: %(default)s)")
    memory.add_argument("--history-dtype", default="float32", help="float32, bfloat16, float16 or int8")
    memory.add_argument("--neighbors", type=int, default=10, help="sampled of a node (default: %(default)s)")
    memory.add_argument("--seeds", type=int, help="nodes that a sampled step trains on (default: as many as a batch)")
    memory.add_argument("--steps", type=int, default=3, help="steps measured, of which the largest counts (default: 3)")
    memory.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    memory.add_argument("--json", type=output_path, help="file for the rows")
    memory.add_argument("--plot", type=output_path, help="file for a figure: .png, .svg or .pdf")
    memory.add_argument("--no-cache", action="store_true", help="compute the partition anew, and do not keep it")
    memory.add_argument("--quiet", action="store_true", help="print the table only")

    plan = commands.add_parser(
        "plan", parents=[common], help="compute what fits a memory budget",
        description="Computes what training would take, for every place of the histories and number of parts, and "
        "names the first that fits. Nothing is trained or allocated.",
    )  # fmt: skip
    plan.set_defaults(run=_plan)
    plan.add_argument("--budget", required=True, help="memory of the GPU, such as 80GB or 24GiB")
    plan.add_argument("--host", default="64GB", help="host memory for histories (default: %(default)s)")
    plan.add_argument("--disk", help="disk for histories (default: none)")
    plan.add_argument("--dataset", help="read the sizes that are not given from a dataset")
    plan.add_argument("--root", help="folder of npz files and downloads (default: $GAS_TRITON_DATA)")
    for name, text in (
        ("nodes", "nodes"),
        ("edges", "directed edges"),
        ("features", "features of a node"),
        ("classes", "classes or labels"),
    ):
        plan.add_argument(f"--{name}", type=int, help=f"number of {text}")
    plan.add_argument("--model", default="gcn", help="gcn, sage, gin or gat (default: %(default)s)")
    plan.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    plan.add_argument("--hidden", type=int, default=64, help="width between layers (default: %(default)s)")
    plan.add_argument("--dropout", type=float, default=0.5, help="on every layer's input (default: %(default)s)")
    plan.add_argument("--num-parts", type=int, nargs="+", help="clusters to try; 1 is full-batch (default: 1 to 2560)")
    plan.add_argument("--batch-size", type=int, default=1, help="clusters of a batch (default: %(default)s)")
    plan.add_argument(
        "--history-dtype", nargs="+", default=["float32"], help="to try, of float32, bfloat16, float16, int8"
    )
    plan.add_argument("--halo-ratio", type=float, default=3.0, help="halo rows a row computed (default: %(default)s)")
    plan.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="whose kernels (default: %(default)s)")
    plan.add_argument("--json", type=output_path, help="file for the candidates")
