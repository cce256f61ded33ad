"""The command line, `gas-triton`: each subcommand is a thin caller of the library."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gas_triton.text import mebibytes

if TYPE_CHECKING:
    import torch

    from gas_triton.datasets import Dataset
    from gas_triton.training import EpochRecord, Result, TrainConfig

__all__ = ["main", "progress"]

INTERRUPTED = 130
FLAT_KEYS = (
    "test_acc", "val_acc", "train_loss", "epoch_seconds", "peak_bytes", "num_parameters", "history_bytes",
    "static_bytes", "best_epoch", "transfers", "interrupted",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: arguments after the program's name; those of the process if None.

    Returns:
        The exit code: 0, 1 where `doctor` finds a fault, 2 for an error, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("gas-triton: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, MemoryError) as error:
        if args.debug:
            raise
        print(f"gas-triton: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


# --- train ------------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    import torch

    from gas_triton import presets
    from gas_triton.cli_diagnose import Diagnoses
    from gas_triton.training import Result, TrainConfig, check_output, find_device, train

    if args.list_presets:
        print(presets.overview())
        return 0
    config = TrainConfig()
    if args.preset is not None:
        dataset_name, config = presets.load(args.preset)
        args.dataset = dataset_name if args.dataset is None else args.dataset
    if args.dataset is None:
        args.usage_error("--dataset or --preset is needed")
    config = replace(config, **_given(args, config))
    for flag, file in (("--json", args.json), ("--profile", args.profile)):
        if file is not None:
            check_output(flag, file)
    if args.resume and args.checkpoint is None:
        raise ValueError("--resume needs --checkpoint, the folder to resume from")
    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cache = None if args.no_cache else args.cache or cache_folder()
    result = Result(interrupted=True)
    diagnoses = Diagnoses(args, lambda line: _say(args, line))
    try:
        dataset = _load(args)
        _say(args, repr(dataset))
        with progress(config.epochs, args.quiet) as on_epoch:
            result = train(
                dataset, config, on_epoch, device=device, cache=cache, checkpoint=args.checkpoint,
                checkpoint_every=args.checkpoint_every, resume=args.resume, profile=args.profile,
                say=lambda line: _say(args, line), **diagnoses.options(),
            )  # fmt: skip
    except KeyboardInterrupt:
        pass  # before the first epoch: the result says that nothing was reached
    diagnoses.finish(f"{args.preset or args.dataset}, {config.layers} layers")
    if args.json is not None:
        args.json.write_text(json.dumps(_report(args, config, result, device), indent=2) + "\n")
    if args.profile is not None:
        _say(args, _transfers(result.transfers))
    print(_summary(result))
    return INTERRUPTED if result.interrupted else 0


def _given(args: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """The fields of a `TrainConfig` that were given as arguments."""
    given = {name: value for name, value in vars(args).items() if name in vars(config)}
    if args.model_option:
        given["model_options"] = {**config.model_options, **dict(args.model_option)}
    return given


def _model_option(text: str) -> tuple[str, Any]:
    """`name=value` with a TOML value, as (name, value)."""
    name, equals, value = text.partition("=")
    try:
        if not (equals and name.isidentifier()):
            raise ValueError
        (only,) = tomllib.loads(f"value = {value}").values()
        # TOML has dates, which the report could not say
        json.dumps(only)
        return name, only
    except (ValueError, TypeError):
        message = f'must be name=value with a value such as true, 0.1, \'"max"\' or \'["mean", "max"]\', got {text}'
        raise argparse.ArgumentTypeError(message) from None


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of arguments that may also be `none`, which takes back what a preset says."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__
    return read


def _report(args: argparse.Namespace, config: TrainConfig, result: Result, device: torch.device) -> dict[str, Any]:
    from gas_triton.doctor import versions

    flat = {key: _finite(getattr(result, key)) for key in FLAT_KEYS}
    data = {
        "preset": args.preset,
        "dataset": args.dataset,
        "split": args.split,
        "nodes": args.nodes,
        "edges": args.edges,
    }
    return {**flat, "config": {**data, "device": str(device), **asdict(config)}, "versions": versions(device)}


def _finite(value: Any) -> Any:
    """`value`, with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary(result: Result) -> str:
    if result.test_acc is None:
        return f"interrupted after {len(result.epochs)} epochs, before the first evaluation"
    peak = "memory not measured" if result.peak_bytes is None else f"{mebibytes(result.peak_bytes)} a step at most"
    history = f" + {mebibytes(result.history_bytes or 0)} histories" if result.history_bytes else ""
    static = f" + {mebibytes(result.static_bytes)} aggregated features" if result.static_bytes else ""
    state = f"interrupted after {len(result.epochs)} epochs: " if result.interrupted else ""
    return (
        f"{state}test {result.test_acc:.4f} (validation {result.val_acc:.4f}, epoch {result.best_epoch}), "
        f"{result.epoch_seconds:.3f} s an epoch, {peak}{history}{static}, {result.num_parameters} parameters"
    )


def _transfers(stats: Mapping[str, Any] | None) -> str:
    if stats is None or stats["hidden_fraction"] is None:
        return "transfers: nothing was pulled from histories"
    return (
        f"transfers: {stats['pulls']} pulls of {mebibytes(stats['pull_bytes'])} in {stats['pull_seconds']:.3f} s, "
        f"{stats['hidden_fraction']:.1%} of it hidden and {stats['exposed_seconds']:.3f} s waited for, "
        f"{stats['misses']} misses; {stats['pushes']} pushes of {mebibytes(stats['push_bytes'])}"
    )


# --- doctor -----------------------------------------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    from gas_triton.doctor import examine

    return 0 if examine() else 1


# --- shared -----------------------------------------------------------------------------------------------------------


@contextmanager
def progress(epochs: int, quiet: bool = False, label: str = "training") -> Iterator[Callable[[EpochRecord], None]]:
    """A progress bar over epochs; gives what `train` takes as `on_epoch`.

    Args:
        epochs: how many there will be.
        quiet: draws nothing.
        label: stands before the bar.
    """
    from tqdm import tqdm

    with tqdm(total=epochs, desc=label, unit="epoch", disable=quiet) as bar:

        def on_epoch(record: EpochRecord) -> None:
            shown = {"loss": f"{record.train_loss:.3f}"}
            if record.val_acc is not None:
                shown["val"] = f"{record.val_acc:.4f}"
            bar.set_postfix(shown, refresh=False)
            if record.epoch > bar.n + 1:
                bar.initial = bar.n = record.epoch - 1  # the epochs before a resume took none of this run's time
            bar.update()

        try:
            yield on_epoch
        except Exception:
            bar.leave = False  # an error message stands alone
            raise
        bar.leave = bar.n > 0  # a resumed run may have nothing left to train


def cache_folder() -> Path:
    """Where METIS partitions are kept: `gas_triton` in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gas_triton"


def _load(args: argparse.Namespace) -> Dataset:
    from gas_triton.datasets import generate, load

    size = {key: value for key, value in (("num_nodes", args.nodes), ("num_edges", args.edges)) if value is not None}
    if not size:
        return load(args.dataset, args.root, args.split)
    if args.dataset.lower() != "generated":
        raise ValueError(f"--nodes and --edges are for --dataset generated, got --dataset {args.dataset}")
    if args.split != 0:
        raise ValueError(f"split: generated has 1 (from 0 to 0), got {args.split}")
    return generate(**size)


def _path(text: str) -> Path:
    """An argument that names a file or folder: an empty one, as of a shell variable that is not set, does not."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def _say(args: argparse.Namespace, line: str) -> None:
    from tqdm import tqdm

    if not args.quiet:
        tqdm.write(line)  # above a bar that is being drawn


def _data_options(required: bool) -> argparse.ArgumentParser:
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--dataset", required=required, help="generated, an npz file of --root, or a PyG or OGB name")
    data.add_argument("--root", help="folder of npz files and downloads (default: $GAS_TRITON_DATA)")
    data.add_argument("--split", type=int, default=0, help="which split of the dataset (default: %(default)s)")
    data.add_argument("--nodes", type=int, help="nodes of the generated graph")
    data.add_argument("--edges", type=int, help="directed edges of the generated graph, an even number")
    data.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return data


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gas-triton", description="Train graph neural networks with historical embeddings (GNNAutoScale)."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", parents=[_data_options(required=False), common], help="train a model and report its test accuracy"
    )
    train.set_defaults(run=_train, usage_error=train.error)
    train.add_argument("--preset", help="dataset and settings of the paper, such as cora-gcn; other arguments override")
    train.add_argument("--list-presets", action="store_true", help="print the presets and end")
    config: list[tuple[str, Callable[[str], Any], str, str]] = [
        ("--model", str, "gcn", "a name of gas_triton.models"),
        ("--layers", int, "2", "layers"),
        ("--hidden", int, "64", "width between layers"),
        ("--dropout", float, "0.5", "probability, on the input of every layer"),
        ("--lr", float, "0.01", "learning rate of Adam"),
        ("--weight-decay", float, "0.0", "of all parameters but the last layer's"),
        ("--weight-decay-last", float, "0.0", "of the last layer's parameters"),
        ("--grad-norm", _or_none(float), "none", "scale gradients down to this norm"),
        ("--edge-dropout", float, "0.0", "probability with which a step leaves an edge out"),
        ("--lipschitz", float, "0.0", "strength of the penalty on layers that amplify noise"),
        ("--lipschitz-noise", float, "0.1", "deviation of that noise"),
        ("--loss-weighting", str, "batch", "batches count alike (batch) or by their training nodes (node)"),
        ("--num-parts", int, "40", "clusters"),
        ("--batch-size", int, "10", "clusters of a batch"),
        ("--partition", str, "metis", "metis or random"),
        ("--partition-seed", int, "0", "seed of the partition"),
        ("--epochs", int, "100", "epochs"),
        ("--max-steps", _or_none(int), "none", "most batches of an epoch"),
        ("--eval-every", int, "1", "epochs between evaluations"),
        ("--history-dtype", str, "float32", "float32, bfloat16, float16 or int8"),
        ("--history-tier", str, "device", "where histories live: device, pinned, file or auto"),
        ("--history-folder", str, "none", "folder for the files of --history-tier file"),
        ("--halo-momentum", float, "0.0", "weight of halo rows computed in the step (GraphFM-OB; beta of LMC)"),
        ("--compensation", str, "none", "gradients through halo rows: none or lmc"),
        ("--nonfinite", str, "raise", "what a NaN or Inf in a history does: raise, warn, skip or allow"),
        (
            "--prefetch-order",
            str,
            "strict",
            "strict reads what the batch before has pushed, stale what was there before",
        ),
    ]
    for flag, kind, default, text in config:
        # absent unless given: a preset, or the library, says the rest
        train.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    train.add_argument(
        "--model-option", type=_model_option, action="append", metavar="NAME=VALUE",
        help="a further argument of the model, as TOML: batch_norm=true, alpha=0.1; may be repeated",
    )  # fmt: skip
    switches = [
        ("--full-batch", "full_batch", True, "train on the whole graph at once"),
        ("--no-histories", "histories", False, "leave out-of-batch neighbours out of training (Cluster-GCN)"),
        ("--no-static", "static_first_layer", False, "aggregate for the first layer in every step"),
        ("--host-features", "host_features", True, "keep the features in host memory"),
    ]
    for flag, field, value, text in switches:
        train.add_argument(flag, dest=field, action="store_const", const=value, default=argparse.SUPPRESS, help=text)
    # presets turn these on
    for flag, text in [
        ("--sparse-features", "read only what is not zero of the features (bags of words)"),
        ("--full-evaluation", "evaluate the whole graph at once, not layer by layer"),
        ("--fill-histories", "let evaluations fill the histories, as PyGAS does"),
    ]:
        train.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    options: list[tuple[str, Callable[[str], Any], Any, str]] = [
        ("--device", str, None, "cpu, cuda or cuda:N (default: a GPU if there is one)"),
        ("--cache", Path, None, "folder that keeps METIS partitions (default: ~/.cache/gas_triton)"),
        ("--json", _path, None, "file for the result"),
        ("--checkpoint", _path, None, "folder for a checkpoint, which a later one replaces"),
        ("--checkpoint-every", int, 1, "epochs between checkpoints (default: 1)"),
        ("--profile", _path, None, "file for a trace of one epoch, for chrome://tracing or Perfetto"),
    ]
    for flag, kind, initial, text in options:
        train.add_argument(flag, type=kind, default=initial, help=text)
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    train.add_argument("--no-cache", action="store_true", help="compute the partition anew, and do not keep it")
    train.add_argument("--quiet", action="store_true", help="print the result only")
    from gas_triton.cli_diagnose import add_arguments

    add_arguments(train, _path)

    from gas_triton import cli_memory, cli_partition

    cli_partition.add_command(commands, _data_options(required=True), common, _load, _path)
    cli_memory.add_commands(commands, _data_options(required=False), common, _load, _path)

    doctor = commands.add_parser("doctor", parents=[common], help="what this machine can run, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


if __name__ == "__main__":
    sys.exit(main())
