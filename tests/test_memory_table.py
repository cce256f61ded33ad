"""The memory of a step way by way: its rows, the share of the data, PyG's models beside ours, and the two commands."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gas_triton as gas
from gas_triton import cli, memory_plot, memory_pyg
from gas_triton.cli_memory import parse_size
from gas_triton.datasets import Dataset, generate
from gas_triton.memory_pyg import Edges, to_pyg
from gas_triton.memory_table import WAYS, Row, compare_memory
from gas_triton.models import MODELS
from gas_triton.receptive_field import data_used, share_of_batch
from gas_triton.text import readable

OURS = ("full", "histories", "pinned", "pinned-in-place", "cluster")
SMALL: dict[str, Any] = {"layers": (2,), "hidden": (16,), "num_parts": 8, "partition": "contiguous", "steps": 2}
MEMORY = ["memory", "--nodes", "600", "--edges", "6000", "--layers", "2", "--hidden", "8", "--num-parts", "6",
          "--device", "cpu", "--steps", "1", "--no-cache"]  # fmt: skip
PLAN = ["plan", "--nodes", "1000000", "--edges", "20000000", "--features", "100", "--classes", "40", "--layers", "3",
        "--hidden", "256"]  # fmt: skip


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(800, 8000, num_features=24)


@pytest.fixture(scope="module")
def rows(dataset: Dataset) -> dict[str, Row]:
    return {row.way: row for row in compare_memory(dataset, OURS, batch_sizes=(2,), **SMALL)}


def test_every_way_has_a_row_whose_numbers_are_those_of_the_graph(dataset: Dataset, rows: dict[str, Row]) -> None:
    assert list(rows) == list(OURS)
    full, device, pinned, cluster = (rows[way] for way in ("full", "histories", "pinned", "cluster"))
    loops = dataset.num_nodes
    assert (full.nodes, full.halo, full.edges) == (800, 0, dataset.num_edges + loops)
    assert full.batch_size is None
    assert all(rows[way].batch_size == 2 for way in OURS[1:])
    assert device.nodes == 200
    assert 0 < device.halo <= 600
    assert (cluster.nodes, cluster.halo) == (200, 0)
    assert cluster.edges < device.edges
    for row in rows.values():
        assert row.reason == ""
        assert row.step_bytes is not None
        assert row.predicted_bytes == pytest.approx(row.step_bytes, rel=0.03)
        parameters = 24 * 16 + 16 + 16 * 16 + 16
        assert row.state_bytes == 3 * 4 * parameters
        assert row.feature_bytes == 800 * (24 * 4 + 8)
    tables = 800 * (16 * 4 + 4)
    assert (device.history_bytes, device.host_bytes) == (tables, 0)
    assert (pinned.history_bytes, pinned.host_bytes) == (tables, tables)
    assert device.device_bytes - pinned.device_bytes == tables
    # slots of staged rows come on top of a step on the device, and are not needed in place
    assert (pinned.step_bytes or 0) > (device.step_bytes or 0) + 2 * 0.8 * device.halo * 16 * 4
    assert rows["pinned-in-place"].step_bytes == pytest.approx(device.step_bytes, rel=0.02)
    assert (cluster.step_bytes or 0) < (device.step_bytes or 0) < (full.step_bytes or 0)


def test_rows_come_in_order_and_one_by_one(dataset: Dataset) -> None:
    said: list[Row] = []
    small = {**SMALL, "layers": (1, 2), "steps": 1}
    found = compare_memory(
        dataset, ("cluster", "full"), models=("SAGE",), batch_sizes=(1, 3), on_row=said.append, **small
    )
    assert said == found
    assert [(row.layers, row.way, row.batch_size) for row in found] == [
        (layers, *rest) for layers in (1, 2) for rest in (("full", None), ("cluster", 1), ("cluster", 3))
    ]
    assert all(row.seconds > 0.0 and row.model == "SAGE" for row in found)


def test_multi_label_data_and_models_without_arithmetic(dataset: Dataset) -> None:
    labels = torch.nn.functional.one_hot(dataset.y, 16).float()
    found = compare_memory(replace(dataset, y=labels), OURS, models=("APPNP",), batch_sizes=(2,), **SMALL)
    assert all(row.step_bytes and row.predicted_bytes is None for row in found)


def test_seeds_give_the_same_numbers_and_generators_stay(dataset: Dataset) -> None:
    before = torch.random.get_rng_state()
    first, second = (compare_memory(dataset, ("histories",), **SMALL) for _ in range(2))
    assert [replace(row, seconds=0.0) for row in first] == [replace(row, seconds=0.0) for row in second]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
def test_rows_of_a_gpu() -> None:
    small = {**SMALL, "hidden": (64,), "steps": 3}
    data = generate(20_000, 200_000)
    found = {row.way: row for row in compare_memory(data, OURS, batch_sizes=(1,), device="cuda", **small)}
    assert all(row.reason == "" and row.predicted_bytes for row in found.values())
    sizes = {way: row.step_bytes or 0 for way, row in found.items()}
    assert 0 < sizes["cluster"] < sizes["histories"] < sizes["full"]
    assert sizes["histories"] < sizes["pinned"]


# --- the share of the data --------------------------------------------------------------------------------------------


def naive_field(edges: list[tuple[int, int]], targets: set[int], layers: int, read: set[tuple[int, int]]):
    """(nodes, edges, edges into the targets) reached through `read`, with sets."""
    nodes, used = set(targets), set()
    direct = {(j, i) for j, i in edges if i in targets and j != i and (j, i) in read}
    for _ in range(layers):
        new = {(j, i) for j, i in edges if i in nodes and j != i and (j, i) in read}
        used |= new
        nodes |= {j for j, _ in new}
    return nodes, used, direct


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("has_halo", [True, False])
def test_the_share_is_that_of_sets(layers: int, has_halo: bool) -> None:
    data = generate(120, 360, num_features=4)
    graph = gas.Graph.from_edge_index(data.edge_index, num_nodes=120).add_self_loops()
    parts = gas.random_partition(graph, 4, 0)
    graph = parts.permute(graph)
    batch = gas.ClusterLoader(graph, parts, shuffle=False).batch([1])
    trained = torch.zeros(120, dtype=torch.bool)
    trained[::3] = True
    edges = list(zip(*graph.edge_index().tolist(), strict=True))
    own = set(batch.node_ids.tolist())
    targets = own & set(trained.nonzero().squeeze(1).tolist())
    read = {(j, i) for j, i in edges if has_halo or (i in own and j in own)}
    used, whole = naive_field(edges, targets, layers, read), naive_field(edges, targets, layers, set(edges))
    expected = tuple(len(part) / len(all_) for part, all_ in zip(used, whole, strict=True))
    found = share_of_batch(batch, graph, trained, layers, has_halo, True)
    assert found == pytest.approx(expected)
    assert (found == (1.0, 1.0, 1.0)) == has_halo


def test_a_step_that_leaves_edges_out_does_not_use_all() -> None:
    data = generate(200, 2000, num_features=4)
    graph = gas.Graph.from_edge_index(data.edge_index, num_nodes=200)
    parts = gas.random_partition(graph, 4, 0)
    graph = parts.permute(graph)
    batch = gas.ClusterLoader(graph, parts, shuffle=False).batch([0]).drop_edges(0.5, seed=1)
    share = share_of_batch(batch, graph, torch.ones(200, dtype=torch.bool), 1, True, True)
    assert share is not None
    assert share[2] == pytest.approx(0.5, abs=0.1)
    nothing = data_used(graph, torch.ones(200, dtype=torch.bool), 2, torch.zeros(graph.num_edges, dtype=torch.bool))
    assert nothing == (1.0, 0.0, 0.0)


# --- PyG --------------------------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("name", ["GCN", "SAGE", "GIN", "GAT", "GCN2", "APPNP"])
def test_pyg_layers_compute_what_ours_do(name: str, torch_geometric: ModuleType) -> None:
    data = generate(150, 1500, num_features=6)
    raw = gas.Graph.from_edge_index(data.edge_index, num_nodes=150)
    graph, kind = MODELS[name].prepare(raw), MODELS[name]
    torch.manual_seed(0)
    model = kind(6, 8, 3, 3, **kind.options_of(graph)).double().eval()
    x, weight = data.x.double(), None if graph.weight is None else graph.weight.double()
    parts = gas.contiguous_partition(graph, [150])
    batch = gas.ClusterLoader(graph, parts, x=x).full()
    batch.edge_weight = weight
    expected = model(batch.features, batch)
    found = to_pyg(model)(x, Edges(graph.edge_index(), weight, 150))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    # on the graph as it came, its layers normalise
    found = to_pyg(model, normalizes=True)(x, Edges(raw.edge_index(), None, 150))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.interop
def test_ways_of_pyg(
    dataset: Dataset, rows: dict[str, Row], torch_geometric: ModuleType, torch_sparse: ModuleType
) -> None:
    full, sampling = compare_memory(dataset, ("full-pyg", "sampling"), batch_sizes=(2,), neighbors=3, **SMALL)
    # a message for every edge, and its product with the weight, as wide as the layer's output
    assert (full.step_bytes or 0) > 2 * 4 * 16 * full.edges
    assert (full.nodes_used, full.edges_used) == (1.0, 1.0)
    assert (sampling.halo, sampling.history_tier, sampling.predicted_bytes) == (0, "", None)
    assert sampling.device_bytes == sampling.state_bytes == full.state_bytes == rows["full"].state_bytes
    assert 0.0 < (sampling.edges_used or 0.0) < 0.7
    # 20 targets a step, with 3 neighbours each and 3 of each of these
    assert sampling.edges <= 20 * 3 + (20 + 20 * 3) * 3
    everything = compare_memory(dataset, ("sampling",), batch_sizes=(8,), neighbors=800, **SMALL)[0]
    assert (everything.nodes_used, everything.edges_used, everything.neighbors_used) == (1.0, 1.0, 1.0)


def test_what_is_missing_is_said(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        memory_pyg.importlib.util, "find_spec", lambda name: None if name == "torch_geometric" else find(name)
    )
    found = compare_memory(dataset, ("full-pyg", "sampling"), **SMALL)
    assert [row.reason for row in found] == ["torch_geometric is not installed: pip install 'gas-triton[pyg]'"] * 2
    assert all(row.step_bytes is None for row in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": ("histroies",)}, "ways: expected some of full, .*, got histroies"),
        ({"models": ("GNC",)}, "models: expected some of GCN.*got GNC"),
        ({"layers": (0,)}, "layers: expected positive ints, got 0"),
        ({"hidden": ()}, "hidden: expected at least one"),
        ({"batch_sizes": (9,)}, r"batch_sizes: expected at most num_parts \(8\), got 9"),
        ({"partition": "metsi"}, "partition: expected one of metis, random, contiguous, got 'metsi'"),
        ({"history_dtype": "int4"}, "history_dtype: expected one of float32.*got 'int4'"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"device": "tpu"}, "device must be one of cpu.*got 'tpu'"),
    ],
)
def test_bad_arguments_are_named(dataset: Dataset, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_memory(dataset, **{**SMALL, "ways": ("histories",), **change})


# --- the commands -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_memory_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    code, out, err = run(
        capsys, *MEMORY, "--ways", "full", "histories", "--batch-size", 2, "--model", "gcn", "sage", "--json", file
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Dataset(generated: 600 nodes, 6000 edges")
    assert [line.split()[0] for line in lines[2:6]] == ["full-batch", "histories"] * 2
    data = json.loads(file.read_text())
    assert data["nodes"] == 600
    assert data["arguments"]["layers"] == [2]
    assert set(data["versions"]) >= {"torch", "device"}
    assert [(row["way"], row["model"]) for row in data["rows"]] == [
        (way, model) for model in ("GCN", "SAGE") for way in ("full", "histories")
    ]
    row = data["rows"][1]
    assert readable(row["step_bytes"]) in lines[3]
    assert row["predicted_off"] == pytest.approx(row["predicted_bytes"] / row["step_bytes"] - 1)
    assert f"{row['predicted_off']:+.1%}" in lines[3]


def test_outputs_are_checked_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(cli, "_load", never)
    assert run(capsys, *MEMORY, "--json", tmp_path / "no" / "x.json")[0] == 2
    code, _, err = run(capsys, *MEMORY, "--plot", tmp_path / "x.gif")
    assert (code, "plot: expected a file that ends in .png, .svg, .pdf, got" in err) == (2, True)
    monkeypatch.setattr(memory_plot, "importlib", Missing)
    code, _, err = run(capsys, *MEMORY, "--plot", tmp_path / "x.png")
    assert (code, "plot needs matplotlib" in err, "pip install 'gas-triton[plot]'" in err) == (2, True, True)


class Missing:
    @staticmethod
    def import_module(name: str) -> None:
        raise ImportError(f"No module named {name!r}")


@pytest.mark.interop
@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_drawn(
    suffix: str,
    start: bytes,
    tmp_path: Path,
    rows: dict[str, Row],
    import_optional: Callable[[str, str], ModuleType],
) -> None:
    import_optional("matplotlib", "plot")
    file = tmp_path / f"memory.{suffix}"
    deeper = [replace(row, layers=3, step_bytes=2 * (row.step_bytes or 0)) for row in rows.values()]
    memory_plot.plot_memory([*rows.values(), *deeper], file, "generated")
    assert file.read_bytes().startswith(start)
    if suffix == "svg":
        # text as paths, each with a comment of what it says
        text = file.read_text()
        assert all(WAYS[way] in text for way in OURS)
    with pytest.raises(ValueError, match="rows: expected at least one that was measured"):
        memory_plot.plot_memory([Row("full", "GCN", 2, 8, 4, None, reason="no")], file)


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    places = [0.5, 0.1, 0.52, 0.51]
    moved = memory_plot._apart(places, 0.06)
    assert sorted(range(4), key=moved.__getitem__) == [1, 0, 3, 2]
    assert min(b - a for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False)) > 0.0599
    assert moved[1] == 0.1


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("1.5 tb", 15 * 10**11), ("512M", 512 * 10**6)],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size("budget", text) == nbytes


def test_bytes_for_a_reader() -> None:
    assert [readable(n) for n in (None, 0, 12, 2000, 15 * 2**20, 2**30, 1.5e15)] == [
        "-", "0 B", "12 B", "1.95 KiB", "15.0 MiB", "1.00 GiB", "1364 TiB",
    ]  # fmt: skip


def test_plan_recommends_a_command_that_train_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    code, out, err = run(capsys, *PLAN, "--budget", "3GB", "--host", "16GB", "--num-parts", 40, 1, 80, "--json", file)
    assert (code, err) == (0, "")
    command = out.splitlines()[-1].split()
    assert command[:2] == ["gas-triton", "train"]
    parsed = cli._parser().parse_args(command[1:])
    assert (parsed.num_parts, parsed.history_tier, parsed.hidden) == (40, "pinned", 256)
    assert "Histories in pinned memory in float32, 40 parts, 1 a batch" in out
    assert "Assumed: 3 halo rows" in out
    data = json.loads(file.read_text())
    best = data["candidates"][data["best"]]
    assert (best["tier"], best["fits"], best["num_parts"]) == ("pinned", True, 40)
    assert best["host"] == 2 * 1_000_000 * (256 * 4 + 4)
    _, out, _ = run(capsys, *PLAN, "--budget", "80GB")
    assert out.splitlines()[-1].endswith("--full-batch")


def test_plan_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *PLAN, "--budget", "2GB", "--host", "1GB", "--num-parts", 40)
    assert "Nothing here fits. What would: --num-parts" in out
    _, out, _ = run(capsys, *PLAN, "--budget", "100MB", "--host", "1GB", "--num-parts", 40)
    assert "more parts, int8 or files would not help" in out
    assert "Nor would features on the host" in out


def test_plan_puts_wide_features_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    # 1M nodes: 4 GB of features beside 0.1 GB of graph
    wide = ("plan", "--nodes", 1_000_000, "--edges", 10_000_000, "--features", 1000, "--classes", 10)
    _, out, _ = run(capsys, *wide, "--budget", "2GB")
    assert "What would: gas-triton train --host-features" in out
    assert "(more than --host)" not in out
    _, out, _ = run(capsys, *wide, "--budget", "2GB", "--host", "1GB")
    assert "(more than --host)" in out


def test_plan_refuses_parts_that_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--nodes", 100, "--edges", 500, "--features", 5, "--classes", 5, "--num-parts", 200)
    code, _, err = run(capsys, "plan", "--budget", "1GB", *sizes)
    assert code != 0
    assert "num_parts: expected 1, or more than batch_size (1) and at most the nodes (100), got 200" in err


def test_memory_checks_its_arguments_before_it_reads_a_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "memory", "--dataset", "no such", "--partition", "foo")
    assert code != 0
    assert "partition: expected one of" in err


def test_plan_reads_sizes_from_a_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--budget", "8GB", "--dataset", "generated", "--num-parts", 1)
    assert code == 0
    assert "100000" in out.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "many"], "budget: expected a size such as 80GB or 24GiB, got 'many'"),
        (["--budget", "80"], "budget: expected a size such as 80GB or 24GiB, got '80'"),
        (["--budget", "8GB", "--host", "0"], "host: expected a size such as 80GB or 24GiB, got '0'"),
        (["--budget", "8GB", "--model", "pna"], "model: expected one of GCN, SAGE, GIN, GAT, got 'pna'"),
        (["--budget", "8GB", "--layers", "0"], "layers: expected a positive int, got 0"),
        (["--budget", "8GB", "--halo-ratio", "-1"], "halo_ratio: expected a number of at least 0, got -1.0"),
        (["--budget", "8GB", "--history-dtype", "int4"], "history_dtype: expected one of float32"),
    ],
)
def test_plan_names_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *PLAN, *arguments)
    assert (code, out, message in err) == (2, "", True), err
    code, _, err = run(capsys, "plan", "--budget", "8GB", "--nodes", 3)
    assert (code, "edges: expected --edges, --features, --classes, or --dataset" in err) == (2, True)
