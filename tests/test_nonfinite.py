"""Rows that are not finite are refused, told of, skipped or stored, on every tier."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

from gas_triton import Batch, HistoryStore
from gas_triton.errors import NonFiniteError

from .prefetch_runs import (
    ENGINES,
    TIERS,
    attach,
)
from .test_history import Net, make_loader


@pytest.mark.parametrize(
    "engine, tier",
    # a table on the device is written by a kernel, whatever the engine
    [*(("inline", tier) for tier in TIERS), *(("late", tier) for tier in TIERS if tier != "device")],
)
@pytest.mark.parametrize(
    "dtype, value",
    [(torch.float32, torch.nan), (torch.float16, 1e6), (torch.bfloat16, torch.inf), (torch.int8, torch.nan)],
)
@pytest.mark.parametrize("nonfinite", ["raise", "warn", "skip", "allow"])
def test_rows_that_are_not_finite(tier: str, nonfinite: str, dtype: torch.dtype, value: float, engine: str) -> None:
    histories = attach(Net(), dtype=dtype, nonfinite=nonfinite, **TIERS[tier])
    store, loader = histories["conv2"], make_loader()
    store.engine = ENGINES[engine]()
    first, batch = loader.batch([4, 0]), loader.batch([0, 5])
    store.push(torch.ones(first.num_nodes, store.dim), first)
    before = copy.deepcopy(store.state_dict())
    x = torch.full((batch.num_nodes, store.dim), 2.0)
    x[[1, 3, 7], [0, 2, 5]] = value
    bad = batch.node_ids[[1, 3, 7]]
    message = (
        f"conv2: 3 rows were not finite as {dtype} at push 1, the first is row {int(bad.min())} of the permuted graph"
    )
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError) as error:
            _push(store, x, batch)
        assert str(error.value) == message
        if engine == "inline":
            # nothing was stored
            for key, kept in before.items():
                now = store.state_dict()[key]
                assert torch.equal(now, kept) if isinstance(kept, Tensor) else now == kept
            # and it is said again, of the same push
            with pytest.raises(NonFiniteError, match="at push 1,"):
                _push(store, x, batch)
        store.push(torch.ones(batch.num_nodes, store.dim), batch)
        store.flush()
        assert torch.equal(store.pull(batch.node_ids).float(), torch.ones(batch.num_nodes, store.dim))
        return
    if nonfinite == "allow":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _push(store, x, batch)
    else:
        with pytest.warns(UserWarning, match="rows were not finite") as record:
            _push(store, x, batch)
        assert [str(w.message) for w in record] == [message + (", kept as it was" if nonfinite == "skip" else "")]
    rows = store.pull(batch.node_ids).float()
    is_bad = torch.zeros(batch.num_nodes, dtype=torch.bool).index_fill_(0, torch.tensor([1, 3, 7]), True)
    torch.testing.assert_close(rows[~is_bad], torch.full_like(rows[~is_bad], 2.0))
    if nonfinite == "skip":
        scale = before["scale"]
        kept = before["table"][bad].float()
        assert torch.equal(rows[is_bad], kept if scale is None else kept * scale[bad][:, None])
        if engine == "inline":
            assert torch.equal(store.last_push[bad], before["last_push"][bad])
    else:
        assert not bool(rows[is_bad].isfinite().all(1).any())
        assert bool((store.age(batch.node_ids) == 0).all())
    assert int(store.clock) == 2


@pytest.mark.filterwarnings("ignore:conv3")
@pytest.mark.parametrize("nonfinite", ["raise", "warn", "skip"])
def test_a_compiled_model_says_it_when_the_step_is_over(nonfinite: str) -> None:
    model = Net()
    histories = attach(model, nonfinite=nonfinite)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        model.conv1.bias[0] = torch.nan
    batches = histories.prefetch(make_loader())
    batch = next(batches)
    compiled(batch.x, batch)
    message = f"conv2: {batch.num_nodes} rows were not finite as torch.float32 at push 0"
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match=message):
            next(batches)
    else:
        with pytest.warns(UserWarning, match=message):
            next(batches)
    assert bool((histories["conv2"].age()[batch.node_ids] == -1).all()) == (nonfinite != "warn")


def _push(store: HistoryStore, x: Tensor, batch: Batch) -> None:
    store.push(x, batch)
    store.flush()
