"""Datasets: the generated graph is what its docstring says, files and downloads arrive unchanged."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from gas_triton import datasets
from gas_triton.datasets import Dataset, generate, known_names, load, row_normalize

SMALL: dict[str, Any] = {"num_nodes": 8000, "num_edges": 160_000, "num_features": 32}


def adjacency(data: Dataset) -> sp.csr_matrix:
    """scipy sums repeated edges, so an entry above 1 is an edge stored twice."""
    source, target = data.edge_index.numpy()
    return sp.csr_matrix((np.ones(len(source)), (source, target)), shape=(data.num_nodes, data.num_nodes))


def accuracy(x: Tensor, data: Dataset) -> float:
    """Test accuracy of a logistic regression on ``x``."""
    x = (x - x.mean(0)) / x.std(0)
    linear = torch.nn.Linear(x.shape[1], data.num_classes)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=60)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x[data.train_mask]), data.y[data.train_mask])
        value = value + 1e-3 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        right = linear(x).argmax(1) == data.y
    return float(right[data.test_mask].float().mean())


@pytest.mark.parametrize(
    "num_nodes, num_edges, num_classes",
    [(8000, 160_000, 16), (200, 2000, 4), (40, 2, 40), (30, 600, 1), (20, 380, 3), (2, 2, 2)],
)
def test_generated_graph_is_simple_symmetric_and_has_the_exact_counts(
    num_nodes: int, num_edges: int, num_classes: int
) -> None:
    data = generate(num_nodes, num_edges, num_classes, num_features=5)
    matrix = adjacency(data)
    assert data.num_nodes == num_nodes
    assert data.num_edges == num_edges == matrix.nnz
    assert matrix.max() == 1
    assert (matrix != matrix.T).nnz == 0
    assert matrix.diagonal().sum() == 0
    code = data.edge_index[0] * num_nodes + data.edge_index[1]
    assert (code.diff() > 0).all()
    masks = torch.stack([data.train_mask, data.val_mask, data.test_mask])
    assert (masks.sum(0) == 1).all()
    assert masks.sum(1).tolist()[:2] == [num_nodes // 10] * 2
    assert 0 <= int(data.y.min()) <= int(data.y.max()) < num_classes


def test_generate_repeats_for_a_seed_and_changes_with_it() -> None:
    first, again, other = generate(**SMALL, seed=3), generate(**SMALL, seed=3), generate(**SMALL, seed=4)
    for key in ("edge_index", "x", "y", "train_mask", "val_mask", "test_mask"):
        assert torch.equal(getattr(first, key), getattr(again, key)), key
        assert not torch.equal(getattr(first, key), getattr(other, key)), key


def test_edges_follow_the_planted_probabilities() -> None:
    # Sparse, so that hardly any edge is drawn twice, which would take edges from inside the communities.
    options: dict[str, Any] = {"num_communities": 20, "label_noise": 0.0, "seed": 1}
    data = generate(20_000, 60_000, num_classes=10, **options, p_community=0.5, p_class=0.2)
    source, target = data.edge_index
    same = (data.y[source] == data.y[target]).float().mean()
    assert float(same) == pytest.approx(0.5 + 0.2 + 0.3 / 10, abs=0.02)
    inside = generate(20_000, 60_000, num_classes=10, **options, p_community=0.8, p_class=0.2)
    assert (inside.y[inside.edge_index[0]] == inside.y[inside.edge_index[1]]).all()
    nothing = generate(20_000, 60_000, num_classes=10, **options, p_community=0.0, p_class=0.0)
    same = (nothing.y[nothing.edge_index[0]] == nothing.y[nothing.edge_index[1]]).float().mean()
    assert float(same) == pytest.approx(0.1, abs=0.02)
    # p_community also ties nodes closer than their class: with 2 communities a class, they are 2 x 10 components.
    separate = generate(20_000, 200_000, num_classes=10, **options, p_community=1.0, p_class=0.0)
    largest = np.sort(np.bincount(sp.csgraph.connected_components(adjacency(separate))[1]))[::-1]
    assert 900 < largest[19] <= largest[0] <= 1000


def test_degrees_are_heavy_tailed_and_the_exponent_sets_how_much() -> None:
    def degrees(exponent: float) -> Tensor:
        data = generate(20_000, 200_000, exponent=exponent)
        return torch.bincount(data.edge_index[1], minlength=data.num_nodes).float()

    hubs, flat = degrees(2.5), degrees(50.0)
    assert hubs.max() > 15 * hubs.mean()
    assert hubs.median() < 0.75 * hubs.mean()
    # A Poisson degree of mean 10 does not reach 40 in 20 000 draws.
    assert flat.max() < 4 * flat.mean()


def test_node_ids_carry_no_information() -> None:
    data = generate(**SMALL)
    neighbours = (data.y[1:] == data.y[:-1]).float().mean()
    assert float(neighbours) == pytest.approx(1 / 16, abs=0.02)
    distance = (data.edge_index[0] - data.edge_index[1]).abs().float().mean() / data.num_nodes
    assert float(distance) == pytest.approx(1 / 3, abs=0.02)


def test_label_noise_is_the_fraction_of_labels_drawn_again() -> None:
    clean, noisy = generate(**SMALL, label_noise=0.0), generate(**SMALL, label_noise=0.4)
    assert torch.equal(clean.x, noisy.x)
    assert float((clean.y != noisy.y).float().mean()) == pytest.approx(0.4 * 15 / 16, abs=0.02)


def test_neighbours_say_more_about_the_class_than_a_row_of_features() -> None:
    data = generate(**SMALL)
    matrix = adjacency(data) + sp.identity(data.num_nodes)
    scale = sp.diags(1 / np.sqrt(matrix.sum(1).A1))
    smooth = torch.from_numpy((scale @ matrix @ scale @ scale @ matrix @ scale @ data.x.numpy()).astype(np.float32))
    alone, together = accuracy(data.x, data), accuracy(smooth, data)
    assert alone > 3 / 16
    assert together > alone + 0.15
    assert 0.8 < together < 0.96


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_edges": 2001}, r"num_edges: expected an even number .*got 2001"),
        ({"num_nodes": 10, "num_edges": 92}, r"num_edges: expected at most 90 for 10 nodes, got 92"),
        ({"num_classes": 201}, r"num_classes: expected at most num_nodes \(200\), got 201"),
        ({"num_nodes": 0}, r"num_nodes: expected a positive integer, got 0"),
        ({"num_edges": -2}, r"num_edges: expected a positive integer, got -2"),
        ({"num_features": 2.5}, r"num_features: expected a positive integer, got 2.5"),
        ({"num_communities": 3}, r"num_communities: expected 4 to 200, got 3"),
        ({"p_community": 1.5}, r"p_community: expected a number in 0..1, got 1.5"),
        ({"p_community": 0.75, "p_class": 0.5}, r"p_community \+ p_class: expected at most 1, got 1.25"),
        ({"label_noise": float("nan")}, r"label_noise: expected a number in 0..1, got nan"),
        ({"exponent": 1.0}, r"exponent: expected a number above 1, got 1.0"),
    ],
)
def test_generate_names_the_wrong_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"num_nodes": 200, "num_edges": 2000, "num_classes": 4, **arguments})


def test_dataset_names_the_wrong_tensor_and_describes_itself() -> None:
    mask = torch.tensor([True, False, False])
    fields: dict[str, Any] = {
        "name": "tiny",
        "edge_index": torch.tensor([[0, 1], [1, 0]]),
        "x": torch.zeros(3, 2),
        "y": torch.tensor([0, 4, 1]),
        "train_mask": mask,
        "val_mask": mask.roll(1),
        "test_mask": mask.roll(2),
    }
    data = Dataset(**fields)
    assert repr(data) == "Dataset(tiny: 3 nodes, 2 edges, 2 features, 5 classes, 1/1/1 train/val/test)"
    assert not data.multi_label
    several = Dataset(**{**fields, "y": torch.zeros(3, 7)})
    assert several.multi_label
    assert several.num_classes == 7
    for key, value, message in (
        ("edge_index", torch.tensor([[0, 3], [1, 0]]), r"edge_index: expected node ids in 0..2, got 0..3"),
        ("edge_index", torch.tensor([[0, -1], [1, 0]]), r"edge_index: expected node ids in 0..2, got -1..1"),
        ("edge_index", torch.zeros(4, 3, dtype=torch.int64), r"edge_index: expected int64 \[2, E\], got .*\[4, 3\]"),
        ("x", torch.zeros(3, 2).double(), r"x: expected float32 \[N, F\], got torch.float64"),
        ("y", torch.zeros(2, dtype=torch.int64), r"y: expected int64 \[3\] or float32 \[3, C\], got torch.int64 \[2\]"),
        ("val_mask", torch.zeros(3), r"val_mask: expected bool \[3\], got torch.float32 \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset(**{**fields, key: value})


# --- files


def write_npz(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    """A directed graph of four nodes, one of them without features."""
    train = np.array([[1, 0], [0, 1], [0, 0], [0, 0]], bool)
    fields: dict[str, Any] = {
        "edge_index": np.array([[0, 2, 3], [1, 1, 0]], np.int32),
        "x": np.array([[1, 3], [0, 0], [0.5, 0], [2, 2]], np.float32),
        "y": np.array([0, 1, 1, 2], np.int32),
        "train_mask": train,
        "val_mask": np.roll(train, 1, axis=0),
        "test_mask": np.array([0, 0, 0, 1], bool),
        **changes,
    }
    np.savez(path, **{key: value for key, value in fields.items() if value is not None})
    return fields


@pytest.mark.parametrize("name", ["Tiny-Graph", "tiny-graph", "TINY_GRAPH", "tinygraph"])
def test_npz_with_two_splits_under_any_spelling(tmp_path: Path, name: str) -> None:
    fields = write_npz(tmp_path / "Tiny-Graph.npz")
    first, second = load(name, tmp_path), load(name, str(tmp_path), split=1)
    assert first.name == "Tiny-Graph"
    assert first.edge_index.tolist() == fields["edge_index"].tolist()
    assert first.x.tolist() == fields["x"].tolist()
    assert first.y.tolist() == [0, 1, 1, 2]
    for data, column in ((first, 0), (second, 1)):
        assert data.train_mask.tolist() == fields["train_mask"][:, column].tolist()
        assert data.val_mask.tolist() == fields["val_mask"][:, column].tolist()
        assert data.test_mask.tolist() == [False, False, False, True]
    for split in (-1, 2):
        with pytest.raises(ValueError, match=rf"split: Tiny-Graph has 2 \(from 0 to 1\), got {split}"):
            load(name, tmp_path, split=split)


def test_npz_with_csr_features_and_the_folder_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = np.array([[1, 0, 0], [0, 0, 0], [2, 0, 3], [0, 4, 0]], np.uint8)
    x = sp.csr_matrix(dense)
    parts = {"x_data": x.data, "x_indices": x.indices.astype(np.uint16), "x_indptr": x.indptr, "x_shape": x.shape}
    write_npz(tmp_path / "sparse.npz", x=None, **parts)
    monkeypatch.setenv("GAS_TRITON_DATA", str(tmp_path))
    assert "sparse" in known_names()
    assert load("sparse").x.tolist() == dense.tolist()


def test_npz_with_several_labels_a_node(tmp_path: Path) -> None:
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool)
    write_npz(tmp_path / "several.npz", y=labels)
    write_npz(tmp_path / "column.npz", y=np.array([[0], [1], [1], [2]]))
    assert load("several", tmp_path).y.tolist() == labels.astype(float).tolist()
    assert load("several", tmp_path).multi_label
    assert load("column", tmp_path).y.tolist() == [0, 1, 1, 2]


def test_features_are_scaled_as_in_the_paper_unless_told_otherwise(tmp_path: Path) -> None:
    for name in ("CiteSeer", "Yelp", "other"):
        write_npz(tmp_path / f"{name}.npz")
    published = torch.tensor([[1, 3], [0, 0], [0.5, 0], [2, 2]])
    rows = torch.tensor([[0.25, 0.75], [0, 0], [0.5, 0], [0.5, 0.5]])
    assert torch.equal(load("citeseer", tmp_path).x, rows)
    assert torch.equal(load("other", tmp_path).x, published)
    for name in ("citeseer", "yelp", "other"):
        assert torch.equal(load(name, tmp_path, normalize_features=True).x, rows)
        assert torch.equal(load(name, tmp_path, normalize_features=False).x, published)
    standard = load("yelp", tmp_path).x
    torch.testing.assert_close(standard.mean(0), torch.zeros(2))
    torch.testing.assert_close(standard.std(0), torch.ones(2))


def test_npz_that_lacks_a_key_says_which(tmp_path: Path) -> None:
    write_npz(tmp_path / "broken.npz", x=None, y=None)
    with pytest.raises(ValueError, match=r"broken.npz: expected keys edge_index, y, .* got no y, x_data, x_indices"):
        load("broken", tmp_path)


@pytest.mark.parametrize(
    "name, nodes, edges, features, classes, masks",
    [
        ("Cora", 2708, 10556, 1433, 7, (140, 500, 1000)),
        ("PubMed", 19717, 88648, 500, 3, (60, 500, 1000)),
        ("AmazonComputers", 13752, 491722, 767, 10, (200, 300, 13252)),
        ("WordNet31", 117791, 368166, 1000, 45, (70674, 23558, 23559)),
    ],
)
def test_real_graphs_arrive_as_published(
    data_root: Path, name: str, nodes: int, edges: int, features: int, classes: int, masks: tuple[int, ...]
) -> None:
    data = load(name.lower(), data_root, normalize_features=False)
    assert (data.num_nodes, data.num_edges, data.num_features, data.num_classes) == (nodes, edges, features, classes)
    assert (int(data.train_mask.sum()), int(data.val_mask.sum()), int(data.test_mask.sum())) == masks
    matrix = adjacency(data)
    assert matrix.nnz == edges
    assert matrix.max() == 1
    assert (matrix != matrix.T).nnz == 0
    with np.load(data_root / f"{name}.npz", allow_pickle=False) as file:
        parts = (file["x_data"].astype(np.float32), file["x_indices"].astype(np.int32), file["x_indptr"])
        expected = sp.csr_matrix(parts, shape=tuple(file["x_shape"]))
        np.testing.assert_array_equal(data.edge_index.numpy(), file["edge_index"])
        np.testing.assert_array_equal(data.y.numpy(), file["y"])
    assert (sp.csr_matrix(data.x.numpy()) != expected).nnz == 0


def test_features_of_cora_are_row_normalized(data_root: Path) -> None:
    x = load("cora", data_root).x
    sums = x.sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert torch.equal(x > 0, load("cora", data_root, normalize_features=False).x > 0)


def test_amazon_has_as_many_splits_as_seeds(data_root: Path) -> None:
    splits = [load("AmazonComputers", data_root, split=split) for split in (0, 1, 1)]
    # The masks of the file were drawn independently of this library, by the same protocol with seed 0.
    drawn = datasets._shchur_split(splits[0].y, 0)
    for key, mask in drawn.items():
        assert torch.equal(getattr(splits[0], key), mask)
        assert torch.equal(getattr(splits[1], key), getattr(splits[2], key))
        assert not torch.equal(getattr(splits[0], key), getattr(splits[1], key))
    assert splits[1].y[splits[1].train_mask].bincount().tolist() == [20] * 10
    assert splits[1].y[splits[1].val_mask].bincount().tolist() == [30] * 10


# --- names and downloads


def test_names_are_listed_and_an_unknown_one_says_so(tmp_path: Path) -> None:
    write_npz(tmp_path / "Mine.npz")
    write_npz(tmp_path / "cora.npz")
    names = known_names(tmp_path)
    assert names[:3] == ("generated", "Mine", "cora")
    assert {"CiteSeer", "CoauthorPhysics", "WikiCS", "Reddit2", "ogbn-products"} < set(names)
    assert "Cora" not in names
    message = r"dataset name: expected one of generated, Mine, cora, .*ogbn-arxiv.*got 'nonsense'"
    with pytest.raises(ValueError, match=message):
        load("nonsense", tmp_path)


def test_generated_by_name_has_one_split() -> None:
    named, direct = load("Generated"), generate()
    assert torch.equal(named.edge_index, direct.edge_index)
    assert torch.equal(named.x, direct.x)
    with pytest.raises(ValueError, match=r"split: generated has 1 \(from 0 to 0\), got 1"):
        load("generated", split=1)


def pyg_data(num_nodes: int = 240) -> dict[str, Tensor]:
    y = torch.arange(num_nodes) % 3
    train = (torch.arange(num_nodes) % 7 == 0)[:, None].repeat(1, 2)
    return {
        "edge_index": torch.stack([torch.arange(num_nodes), torch.arange(num_nodes).roll(1)]),
        "x": torch.rand(num_nodes, 4) + 1,
        "y": y,
        "train_mask": train[:, 0],
        "val_mask": train[:, 0].roll(1),
        "test_mask": train[:, 0].roll(2),
    }


@pytest.mark.parametrize(
    "name, class_name, arguments",
    [
        ("cora", "Planetoid", {"name": "Cora"}),
        ("PUBMED", "Planetoid", {"name": "PubMed"}),
        ("coauthor-cs", "Coauthor", {"name": "CS"}),
        ("CoauthorPhysics", "Coauthor", {"name": "Physics"}),
        ("amazon_computers", "Amazon", {"name": "Computers"}),
        ("AmazonPhoto", "Amazon", {"name": "Photo"}),
        ("flickr", "Flickr", {}),
        ("reddit", "Reddit", {}),
        ("Reddit2", "Reddit2", {}),
    ],
)
def test_names_map_to_torch_geometric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, class_name: str, arguments: dict[str, Any]
) -> None:
    published = pyg_data()
    calls = []

    def dataset(root: str, **kwargs: Any) -> list[dict[str, Tensor]]:
        calls.append((root, kwargs))
        return [published]

    monkeypatch.setattr(datasets, "_import", lambda module, name, root: SimpleNamespace(**{class_name: dataset}))
    data = load(name, tmp_path, normalize_features=False)
    assert calls == [(str(tmp_path / class_name), arguments)]
    assert torch.equal(data.edge_index, published["edge_index"])
    assert torch.equal(data.x, published["x"])
    if class_name in ("Coauthor", "Amazon"):
        assert data.y[data.train_mask].bincount().tolist() == [20] * 3
        assert data.y[data.val_mask].bincount().tolist() == [30] * 3
        assert torch.equal(data.test_mask, ~(data.train_mask | data.val_mask))
        assert not torch.equal(load(name, tmp_path, split=5).train_mask, data.train_mask)
    else:
        assert torch.equal(data.val_mask, published["val_mask"])
        with pytest.raises(ValueError, match=r"has 1 \(from 0 to 0\), got 5"):
            load(name, tmp_path, split=5)


@pytest.mark.parametrize(
    "name, class_name, arguments, multi_label",
    [
        ("ppi", "PPI", {}, True),
        ("CLUSTER", "GNNBenchmarkDataset", {"name": "CLUSTER"}, False),
        ("pattern", "GNNBenchmarkDataset", {"name": "PATTERN"}, False),
    ],
)
def test_a_set_of_graphs_is_one_graph_without_edges_between_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    class_name: str,
    arguments: dict[str, Any],
    multi_label: bool,
) -> None:
    def graph(num_nodes: int) -> dict[str, Tensor]:
        y = (torch.rand(num_nodes, 5) < 0.4).float() if multi_label else torch.arange(num_nodes) % 3
        return {
            "edge_index": torch.randint(num_nodes, (2, 3 * num_nodes)),
            "x": torch.rand(num_nodes, 4),
            "y": y,
        }

    splits = {"train": [graph(4), graph(3), graph(6)], "val": [graph(5)], "test": [graph(2), graph(1)]}
    calls = []

    def dataset(root: str, split: str, **kwargs: Any) -> list[dict[str, Tensor]]:
        calls.append((root, kwargs))
        return splits[split]

    monkeypatch.setattr(datasets, "_import", lambda module, name, root: SimpleNamespace(**{class_name: dataset}))
    data = load(name, tmp_path)
    assert calls == [(str(tmp_path / class_name), arguments)] * 3
    assert (data.num_nodes, data.num_edges, data.multi_label) == (21, 63, multi_label)
    first = 0
    for part, graphs in splits.items():
        assert int(getattr(data, f"{part}_mask").sum()) == sum(len(published["x"]) for published in graphs)
        for published in graphs:
            rows = slice(first, first + len(published["x"]))
            assert getattr(data, f"{part}_mask")[rows].all()
            assert torch.equal(data.x[rows], published["x"])
            assert torch.equal(data.y[rows], published["y"])
            inside = (data.edge_index >= rows.start) & (data.edge_index < rows.stop)
            assert torch.equal(inside[0], inside[1])
            assert torch.equal(data.edge_index[:, inside[0]] - first, published["edge_index"])
            first = rows.stop
    with pytest.raises(ValueError, match=r"has 1 \(from 0 to 0\), got 1"):
        load(name, tmp_path, split=1)


@pytest.mark.interop
def test_ppi_is_read_as_torch_geometric_stores_it(tmp_path: Path, torch_geometric: ModuleType) -> None:
    raw = tmp_path / "PPI" / "raw"
    raw.mkdir(parents=True)
    nodes = {"train": [1, 1, 1, 2, 2], "valid": [21, 21], "test": [23, 23, 23]}
    for part, graph_of in nodes.items():
        count = len(graph_of)
        # a path through each graph, and a self loop, which torch_geometric takes out
        links = [{"source": 0, "target": 0}]
        links += [{"source": i, "target": i + 1} for i in range(count - 1) if graph_of[i] == graph_of[i + 1]]
        ids = [{"id": i} for i in range(count)]
        content = {"directed": True, "graph": {}, "nodes": ids, "links": links, "multigraph": False}
        (raw / f"{part}_graph.json").write_text(json.dumps(content))
        np.save(raw / f"{part}_feats.npy", np.full((count, 2), float(count)))
        np.save(raw / f"{part}_labels.npy", np.eye(count, 3))
        np.save(raw / f"{part}_graph_id.npy", np.array(graph_of))
    data = load("ppi", tmp_path)
    assert (data.num_nodes, data.num_classes, data.multi_label) == (10, 3, True)
    assert data.train_mask.tolist() == [True] * 5 + [False] * 5
    assert data.test_mask.tolist() == [False] * 7 + [True] * 3
    assert data.x[:, 0].tolist() == [5.0] * 5 + [2.0] * 2 + [3.0] * 3
    assert sorted(zip(*data.edge_index.tolist(), strict=True)) == [(0, 1), (1, 2), (3, 4), (5, 6), (7, 8), (8, 9)]


def test_missing_packages_and_failed_downloads_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {module!r}")

    def offline(root: str) -> None:
        raise OSError("Name or service not known")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.importlib, "import_module", absent)
        for name in ("Reddit", "ogbn-arxiv"):
            with pytest.raises(
                ImportError, match=rf"{name} needs torch_geometric .*pip install 'gas-triton\[pyg\]', or put {name}.npz"
            ):
                load(name, tmp_path)
    package = SimpleNamespace(Reddit=offline, __name__="torch_geometric.datasets")
    monkeypatch.setattr(datasets, "_import", lambda module, name, root: package)
    with pytest.raises(RuntimeError, match=r"Reddit: torch_geometric.*service not known.*put the file Reddit.npz") as e:
        load("reddit", tmp_path)
    assert str(tmp_path) in str(e.value)
    assert isinstance(e.value.__cause__, OSError)


@pytest.mark.interop
def test_wikics_stops_on_its_stopping_masks(tmp_path: Path, torch_geometric: ModuleType) -> None:
    raw = tmp_path / "WikiCS" / "raw"
    raw.mkdir(parents=True)
    content = {
        "features": [[0.5, 1.0], [2.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
        "labels": [0, 1, 1, 0],
        "links": [[1], [2], [], []],
        "train_masks": [[1, 0, 0, 0], [0, 1, 0, 0]],
        "val_masks": [[0, 1, 0, 0], [1, 0, 0, 0]],
        "stopping_masks": [[0, 0, 1, 0], [0, 0, 1, 0]],
        "test_mask": [0, 0, 0, 1],
    }
    (raw / "data.json").write_text(json.dumps(content))
    data = load("wikics", tmp_path, split=1)
    assert data.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert data.train_mask.tolist() == [False, True, False, False]
    assert data.val_mask.tolist() == [False, False, True, False]
    assert data.test_mask.tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match=r"split: WikiCS has 2 \(from 0 to 1\), got 2"):
        load("wikics", tmp_path, split=2)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_arxiv_is_made_symmetric_and_reloads_from_its_cache(
    tmp_path: Path, import_optional: Callable[[str, str], ModuleType], torch_geometric: ModuleType
) -> None:
    import_optional("ogb", "pyg")
    root = tmp_path / "OGB" / "ogbn_arxiv"
    files = {
        "raw/edge": "0,1\n1,2\n2,1\n3,0\n",
        "raw/node-feat": "0,1\n2,3\n4,5\n6,7\n",
        "raw/node-label": "0\n2\n1\n0\n",
        "raw/node_year": "2010\n2011\n2012\n2013\n",
        "raw/num-node-list": "4\n",
        "raw/num-edge-list": "4\n",
        "split/time/train": "0\n1\n",
        "split/time/valid": "2\n",
        "split/time/test": "3\n",
    }
    for name, text in files.items():
        path = root / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))
    (root / "RELEASE_v1.txt").touch()
    # The second time ogb reads what it stored, which torch.load refuses by default since torch 2.6.
    for data in (load("ogbn-arxiv", tmp_path), load("OGBN_arxiv", tmp_path)):
        assert data.edge_index.tolist() == [[0, 0, 1, 1, 2, 3], [1, 3, 0, 2, 1, 0]]
        assert data.x.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert data.y.tolist() == [0, 2, 1, 0]
        assert data.train_mask.tolist() == [True, True, False, False]
        assert data.val_mask.tolist() == [False, False, True, False]
        assert data.test_mask.tolist() == [False, False, False, True]


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["binary", "counts", "small", "signed"])
def test_row_normalize_is_normalize_features(torch_geometric: ModuleType, kind: str) -> None:
    from torch_geometric.data import Data
    from torch_geometric.transforms import NormalizeFeatures

    x = torch.rand(50, 9)
    x = {"binary": (x < 0.2).float(), "counts": (9 * x).floor(), "small": x / 100, "signed": x - 0.5}[kind]
    x[3] = x.min()
    before = x.clone()
    result = row_normalize(x)
    assert torch.equal(result, NormalizeFeatures()(Data(x=x.clone())).x)
    assert torch.equal(x, before)


def test_row_normalize_divides_by_the_sum_and_keeps_zero_rows() -> None:
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0], [5.0, 0.0]])
    assert row_normalize(x).tolist() == [[0.25, 0.75], [0.0, 0.0], [1.0, 0.0]]
    assert row_normalize(torch.zeros(0, 4)).shape == (0, 4)
