"""Peak memory: exact on allocations of known size, wherever they are made."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from gas_triton.memory import peak_bytes

KIB = 256  # float32 values


@torch.library.custom_op("gas_triton_tests::hidden_temporary", mutates_args=())
def hidden_temporary(x: Tensor) -> Tensor:
    """Gives a copy of `x`; allocates ten times as much on the way."""
    temporary = torch.empty(10 * x.numel())
    temporary.fill_(1.0)
    return x.clone()


def test_peak_of_known_allocations_is_exact() -> None:
    def known() -> None:
        first = torch.empty(3 * KIB)
        second = torch.empty(5 * KIB)
        del first
        third = torch.empty(4 * KIB)
        del second, third

    for _ in range(3):
        with peak_bytes("cpu") as peak:
            known()
        assert peak.nbytes == (5 + 4) * 1024
    with peak_bytes("cpu") as peak:
        kept = torch.empty(2 * KIB)
        known()
    assert peak.nbytes == (2 + 5 + 4) * 1024
    assert kept.numel() == 2 * KIB
    with peak_bytes("cpu") as peak:
        pass
    assert peak.nbytes == 0


def test_no_object_is_made_of_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    # a step of many small ops has 100 000 of them, and took ten seconds to measure
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an event became an object")

    monkeypatch.setattr(torch.autograd.profiler, "FunctionEvent", refuse)
    with peak_bytes("cpu") as peak:
        kept = torch.ones(KIB).neg()
    assert peak.nbytes == 2 * 1024
    assert kept.numel() == KIB


def test_temporaries_inside_a_custom_op_count() -> None:
    x = torch.ones(KIB)
    with peak_bytes("cpu") as peak:
        kept = torch.empty(7 * KIB)
        result = hidden_temporary(x)
    assert peak.nbytes == (7 + 10 + 1) * 1024
    assert result.numel() + kept.numel() == 8 * KIB


def test_a_backward_pass_counts() -> None:
    x = torch.ones(64 * KIB, requires_grad=True)
    with peak_bytes("cpu") as forward:
        y = x.exp().sum()
    del y
    with peak_bytes("cpu") as both:
        x.exp().sum().backward()
    # exp keeps its result for the backward pass; the gradient of x is the second array
    assert forward.nbytes == pytest.approx(64 * 1024, abs=64)
    assert both.nbytes == pytest.approx(2 * 64 * 1024, abs=64)


def test_what_was_allocated_before_makes_no_room() -> None:
    early = torch.empty(100 * KIB)
    with peak_bytes("cpu"):
        middle = torch.empty(100 * KIB)
    del middle
    # most likely at the address that the profile above saw allocated
    late = torch.empty(100 * KIB)
    with peak_bytes("cpu") as peak:
        del early, late
        kept = torch.empty(3 * KIB)
    assert peak.nbytes == 3 * 1024
    assert kept.numel() == 3 * KIB


def allocate_and_fail(nbytes: int) -> None:
    torch.empty(nbytes, dtype=torch.uint8)
    raise KeyError("inside")


def test_the_peak_is_set_when_the_block_raises() -> None:
    with pytest.raises(KeyError, match="inside"), peak_bytes("cpu") as peak:
        allocate_and_fail(5000)
    assert peak.nbytes == 5000
    with peak_bytes("cpu") as again:
        torch.empty(KIB)
    assert again.nbytes == 1024


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="device must be a cpu or cuda device, got meta"), peak_bytes("meta"):
        pass
    with peak_bytes("cpu") as outer:
        with pytest.raises(RuntimeError, match="already running in this thread"), peak_bytes("cpu"):
            pass
        torch.empty(KIB)
    assert outer.nbytes == 1024


def test_nothing_is_printed_and_the_environment_stays() -> None:
    program = (
        "import os, torch\n"
        "from gas_triton.memory import peak_bytes\n"
        "before = dict(os.environ)\n"
        "for _ in range(2):\n"
        "    with peak_bytes('cpu'):\n"
        "        torch.ones(5).sum()\n"
        "assert dict(os.environ) == before\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# A training step of some hundred MiB. Every large tensor is a mapping of its own (MALLOC_MMAP_THRESHOLD_), so that its
# pages come when it is written and go when it is freed: the kernel's count of the process's pages is the truth.
AGAINST_THE_KERNEL = """
import gc, json, re
from pathlib import Path
import torch
import torch.nn.functional as F
import gas_triton as gas
from gas_triton.memory import peak_bytes
from gas_triton.models import GCN

def pages(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
N, E, FEATURES = 32_000, 128_000, 128
graph = gas.Graph.from_edge_index(torch.randint(N, (2, E)), num_nodes=N)
parts = gas.contiguous_partition(graph, [N // 2] * 2)
x, y = torch.randn(N, FEATURES), torch.randint(8, (N,))
graph, x, y = parts.permute(graph, x, y)
graph = graph.add_self_loops().gcn_norm()
model = GCN(FEATURES, 256, 8, 3, dropout=0.5)
gas.attach_histories(model, N)
for store in (conv.history for conv in model.convs[1:]):
    # rows that were never written have no pages yet
    store._tensors["table"].fill_(0.0)
loader = gas.ClusterLoader(graph, parts, 1, shuffle=False, x=x, y=y)
optimizer = torch.optim.Adam(model.parameters())

def step():
    batch = loader.batch([1])
    out = model(batch.features, batch)
    loss = F.cross_entropy(out, batch.y)
    del out
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loader._planned.clear()

step()
rises, counts = [], []
for _ in range(2):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = pages("VmHWM")
    step()
    rises.append(pages("VmHWM") - before)
with peak_bytes("cpu") as peak:
    step()
counts.append(peak.nbytes)
print(json.dumps({"rises": rises, "counts": counts}))
"""


def test_the_count_is_what_the_kernel_says() -> None:
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TOP_PAD_="0", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", AGAINST_THE_KERNEL], capture_output=True, text=True, env=environment)
    if "clear_refs" in done.stderr:
        pytest.skip("the peak of the process's memory cannot be reset here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert min(found["counts"]) > 100 * 2**20
    for count in found["counts"]:
        # whole pages, and small blocks that malloc keeps
        assert count == pytest.approx(min(found["rises"]), rel=0.02), found


@pytest.mark.gpu
def test_peak_on_a_gpu_is_exact_in_blocks_of_512_bytes() -> None:
    early = torch.empty(1024, device="cuda")
    with peak_bytes("cuda") as peak:
        first = torch.empty(2 * KIB, device="cuda")
        second = torch.empty(4 * KIB, device="cuda")
        del first
        third = torch.empty(KIB, device="cuda")
    assert peak.nbytes == (2 + 4) * 1024
    assert early.numel() + second.numel() + third.numel() == 1024 + 5 * KIB
