"""What this machine can run, and which optional parts are missing and how to get them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.graph import Graph
from gas_triton.loader import ClusterLoader
from gas_triton.partition import contiguous_partition, metis

__all__ = ["aggregate_error", "device_name", "examine", "versions"]

REQUIRED = ("numpy", "pymetis", "tqdm")
# package -> the extra that brings it, and what it is for
OPTIONAL = {
    "torch_geometric": ("pyg", "its datasets and models"),
    "ogb": ("pyg", "OGB datasets"),
    "torch_sparse": ("sparse", "graphs given as SparseTensor"),
    "torch_scatter": ("sparse", "needed by torch_sparse"),
    "matplotlib": ("plot", "figures"),
}
# The oldest GPUs that the kernels are compiled for in the tests.
CAPABILITY = (8, 0)
# One warp adds up at most 512 edges of a node, in float32.
_TOLERANCE = 1e-5

Aggregate = Callable[[Tensor, Batch, Tensor], Tensor]


def examine(print_line: Callable[[str], None] = print) -> bool:
    """Examines this machine and says what it found.

    Each device aggregates the neighbours of a small graph and compares the result with plain torch in float64.

    Args:
        print_line: takes the report, line by line.

    Returns:
        Whether the machine can be used: nothing required is missing, and every device computes the right numbers.
    """
    found = versions(torch.device("cpu"))
    print_line(f"gas_triton {found['gas_triton']}, Python {found['python']}, torch {found['torch']}")
    verdict = _verdict(lambda: aggregate_error("cpu"))
    print_line(f"CPU      {found['device']}, {torch.get_num_threads()} threads: {verdict}")
    healthy = verdict == "ok"
    if torch.cuda.device_count() == 0:
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch finds none"
        print_line(f"CUDA     no GPU: {reason}")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        capability = torch.cuda.get_device_capability(device)
        verdict = _verdict(lambda device=device: aggregate_error(device))  # type: ignore[misc]
        healthy = healthy and verdict == "ok"
        older = "" if capability >= CAPABILITY else f" (below {_dotted(CAPABILITY)}, the oldest that is tested)"
        name = f"{device_name(device)}, compute capability {_dotted(capability)}{older}"
        print_line(f"CUDA     {name}: {verdict}")
    print_line(f"Triton   {_triton(found['triton'])}")
    verdict = _verdict(_partition_error)
    healthy = healthy and verdict == "ok"
    print_line(f"METIS    pymetis {_version('pymetis') or 'is missing'}: {verdict}")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    for name in missing:
        print_line(f"missing  {name}, which is required: pip install gas-triton")
    for name, (extra, purpose) in OPTIONAL.items():
        version = _version(name) if importlib.util.find_spec(name) else None
        state = f"{version} " if version else f"missing, pip install 'gas-triton[{extra}]' "
        print_line(f"optional {name} {state}({purpose})")
    print_line(f"data     {_data_folder()}")
    healthy = healthy and not missing
    print_line("This machine can train." if healthy else "This machine cannot train: see what failed above.")
    return healthy


def versions(device: torch.device) -> dict[str, str | None]:
    """Versions of what a result depends on, and the name of the device; None for a package that is not installed."""
    import gas_triton

    return {
        "gas_triton": gas_triton.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The maker's name of a CPU or GPU, such as "NVIDIA A100-SXM4-80GB"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        described = ""
    names = [line.split(":", 1)[1].strip() for line in described.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def aggregate_error(device: torch.device | str, aggregate: Aggregate | None = None) -> float:
    """Aggregates a small batch whose halo is read from a history, and compares it with plain torch in float64.

    Args:
        device: where to compute.
        aggregate: maps (x, batch, history) to the weighted sums; `functional.aggregate` if None.

    Returns:
        The largest difference; inputs are of order 1.
    """
    from gas_triton.kernels.aggregate import aggregate_ref

    draw = torch.Generator().manual_seed(0)
    edge_index = torch.randint(24, (2, 120), generator=draw)
    graph = Graph.from_edge_index(edge_index, num_nodes=24).add_self_loops().gcn_norm().to(device)
    batch = ClusterLoader(graph, contiguous_partition(graph, [10, 14])).batch([0])
    x = torch.randn(batch.num_nodes, 8, generator=draw).to(device)
    history = torch.randn(batch.graph_nodes, 8, generator=draw).to(device)
    if aggregate is None:
        out = functional.aggregate(x, batch, history, edge_weight=batch.edge_weight)
    else:
        out = aggregate(x, batch, history)
    weight = None if batch.edge_weight is None else batch.edge_weight.double()
    expected = aggregate_ref(x.double(), history.double(), weight, list(batch.inner), list(batch.outer))
    return float((out.double() - expected).abs().max())


def interpreted_error() -> float:
    """The same of the Triton kernel in Triton's interpreter; needs TRITON_INTERPRET=1 from the start of the process."""
    from gas_triton.kernels.aggregate import aggregate_triton

    def aggregate(x: Tensor, batch: Batch, history: Tensor) -> Tensor:
        inner, outer = list(batch.inner), list(batch.outer)
        return aggregate_triton(
            x, history, None, batch.edge_weight, inner, outer, [], None, batch.hubs, [], "sum", 0.0, None,
            batch.hub_edges, False,
        )[0]  # fmt: skip

    return aggregate_error("cpu", aggregate)


def _triton(version: str | None) -> str:
    if version is None:
        return "missing: it has wheels for Linux only; the CPU is used without it"
    program = "from gas_triton.doctor import interpreted_error; print(interpreted_error())"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    verdict = _verdict(lambda: float(done.stdout)) if done.returncode == 0 else f"failed: {_last_line(done.stderr)}"
    where = "on the GPU" if torch.cuda.device_count() else "only with a CUDA GPU"
    return f"{version}: kernels run {where}; in the interpreter (TRITON_INTERPRET=1): {verdict}"


def _partition_error() -> float:
    source = torch.arange(30)
    ring = Graph.from_edge_index(torch.stack([source, (source + 1) % 30]))
    sizes = metis(ring, 3).ptr.diff()
    return 0.0 if int(sizes.sum()) == 30 else 1.0


def _verdict(measure: Callable[[], float]) -> str:
    try:
        wrong_by = measure()
    except Exception as error:  # whatever a broken installation raises is what the user wants to read
        return f"failed: {type(error).__name__}: {_last_line(str(error))}"
    return "ok" if wrong_by < _TOLERANCE else f"failed: wrong by {wrong_by:.1g}"


def _data_folder() -> str:
    named = os.environ.get("GAS_TRITON_DATA")
    folder = Path(named or "~/.cache/gas_triton").expanduser()
    files = sorted(path.stem for path in folder.glob("*.npz"))
    origin = "GAS_TRITON_DATA" if named else "GAS_TRITON_DATA is not set"
    return f"{folder} ({origin}): {', '.join(files) or 'no npz files'}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
