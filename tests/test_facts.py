"""What a step asks of a GPU is what `bench/expected/facts.json` says: launches, ops, tensors, bytes, waits."""

import pytest
import torch
from torch import Tensor

from bench import facts
from bench.counting import Counted
from gas_triton.nn import GCNConv

if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU, not interpreted", allow_module_level=True)


def test_the_file_has_the_cases():
    assert list(facts.read()["cases"]) == list(facts.CASES)


@pytest.mark.parametrize("name", facts.CASES)
def test_facts(name):
    wrong = facts.check(name, facts.read())
    assert not wrong, "\n".join([*wrong, f"to accept this: {facts.ACCEPT}"])


def test_all_facts_are_compared():
    expected = facts.read()["torch"]
    if expected != facts.version_of_torch():
        pytest.skip(
            f"facts.json was counted with torch {expected} and this is {torch.__version__}: only launches and waits "
            f"are compared. Install torch {expected} (pip install -c constraints.txt torch), or accept what this one "
            f"does with: {facts.ACCEPT}"
        )


@pytest.fixture(scope="module")
def counted_before() -> dict:
    # not those of the file, which are of one version of torch
    return facts.facts_of(facts.count("GCN"))


def test_counts_are_the_same_again_and_with_more_threads(counted_before):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert facts.facts_of(facts.count("GCN")) == counted_before
    finally:
        torch.set_num_threads(before)


def change(monkeypatch, make):
    """Makes GCNConv give `make(layer, out, batch)`."""
    forward = GCNConv.forward

    def changed(layer: GCNConv, x: Tensor, batch, edge_weight: Tensor | None = None) -> Tensor:
        return make(layer, forward(layer, x, batch, edge_weight), batch)

    monkeypatch.setattr(GCNConv, "forward", changed)


def differences(before: dict) -> list[str]:
    counted = facts.count("GCN")
    return facts.differences(before, facts.facts_of(counted), counted)


def test_a_needless_copy_shows(monkeypatch, counted_before):
    change(monkeypatch, lambda layer, out, batch: out.clone())
    found = "\n".join(differences(counted_before))
    where = "tests.test_facts.test_a_needless_copy_shows.<locals>.<lambda>"
    assert f"forward, torch, clone: 0 -> 3 (now in {where} (3))" in found
    tensors = counted_before["forward"]["tensors"]
    assert f"forward, tensors: {tensors} -> {tensors + 3}" in found
    # float32 rows, read and written
    widths = 64 + 64 + facts.CLASSES
    touched, rows = counted_before["forward"]["bytes touched"], facts.NODES // 3
    assert f"forward, bytes touched: {touched:,} -> {touched + 2 * 4 * rows * widths:,}" in found
    assert "backward, triton" not in found


def test_a_second_launch_shows(monkeypatch, counted_before):
    def twice(layer, out, batch):
        if layer.history is not None:
            layer.history.push(torch.zeros(batch.num_nodes, layer.history.dim), batch)
        return out

    change(monkeypatch, twice)
    assert any("forward, triton, _push_kernel: 2 -> 4" in line for line in differences(counted_before))


def test_reads_by_the_host_show(monkeypatch):
    change(monkeypatch, lambda layer, out, batch: (out.sum().item(), out.sum().tolist(), out.sum().cpu(), out)[-1])
    wrong = facts.check("GCN", facts.read())
    where = "tests.test_facts.test_reads_by_the_host_show.<locals>.<lambda>"
    for call in ("_local_scalar_dense", "tolist", "cpu"):
        assert f"GCN: the host waits for the device: {call} in {where}" in wrong


def test_another_torch_compares_launches_alone(monkeypatch):
    monkeypatch.setattr(facts, "version_of_torch", lambda: "0.1")
    change(monkeypatch, lambda layer, out, batch: out.clone())
    assert facts.check("GCN", facts.read()) == []


def test_peak_is_what_lives_at_once():
    with Counted() as counted:
        kept = torch.ones(100, device=torch.device("cpu"))
        with counted.phase("work"):
            for _ in range(3):
                kept = kept + 1
            del kept
        with counted.phase("no more"):
            torch.zeros(100, device=torch.device("cpu"))
    work = counted.phases["work"]
    assert (work.tensors, work.nbytes, work.touched) == (3, 1200, 2400)
    # a sum and the one before it; `kept` from before is freed by the second
    assert counted.peak == 400
    assert counted.phases["no more"].torch == {"zeros": 1}
