"""Node classification data: a generated graph of any size, ``.npz`` files, PyTorch Geometric and OGB."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gas_triton.errors import MissingPackageError
from gas_triton.generated import generate

__all__ = ["Dataset", "generate", "known_names", "load", "row_normalize"]

# name -> (class in torch_geometric.datasets, its arguments after ``root``)
_PYG: dict[str, tuple[str, dict[str, Any]]] = {
    "Cora": ("Planetoid", {"name": "Cora"}),
    "CiteSeer": ("Planetoid", {"name": "CiteSeer"}),
    "PubMed": ("Planetoid", {"name": "PubMed"}),
    "CoauthorCS": ("Coauthor", {"name": "CS"}),
    "CoauthorPhysics": ("Coauthor", {"name": "Physics"}),
    "AmazonComputers": ("Amazon", {"name": "Computers"}),
    "AmazonPhoto": ("Amazon", {"name": "Photo"}),
    "WikiCS": ("WikiCS", {"is_undirected": True}),
    "Flickr": ("Flickr", {}),
    "Reddit": ("Reddit", {}),
    "Reddit2": ("Reddit2", {}),
    "Yelp": ("Yelp", {}),
}
# The same for sets of graphs, published as three splits.
_PYG_SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "PPI": ("PPI", {}),
    "CLUSTER": ("GNNBenchmarkDataset", {"name": "CLUSTER"}),
    "PATTERN": ("GNNBenchmarkDataset", {"name": "PATTERN"}),
}
_OGB = ("ogbn-arxiv", "ogbn-products")
_MASKS = ("train_mask", "val_mask", "test_mask")
_ROW_NORMALIZED = {"cora", "citeseer", "pubmed"}
_STANDARDIZED = {"reddit2", "yelp"}
# Published without a split: each number seeds one.
_UNSPLIT = {"coauthorcs", "coauthorphysics", "amazoncomputers", "amazonphoto"}


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """One graph with node features, labels and one train / validation / test split.

    Args:
        name: what the graph is called.
        edge_index: int64 [2, E], row 0 = source, row 1 = target.
        x: float32 [N, F], node features.
        y: int64 [N], one class a node, or float32 [N, C] of zeros and ones for multi-label data.
        train_mask: bool [N], nodes whose label is trained on.
        val_mask: bool [N], nodes that choose the model.
        test_mask: bool [N], nodes that are reported.

    Raises:
        ValueError: a tensor has another shape or dtype, or an edge names a node outside 0..N-1.
    """

    name: str
    edge_index: Tensor
    x: Tensor
    y: Tensor
    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor

    def __post_init__(self) -> None:
        _expect(self.x.dim() == 2 and self.x.dtype == torch.float32, "x", "float32 [N, F]", self.x)
        n = self.num_nodes
        classes = self.y.dtype == torch.int64 and self.y.shape == (n,)
        labels = self.y.dtype == torch.float32 and self.y.dim() == 2 and len(self.y) == n
        _expect(classes or labels, "y", f"int64 [{n}] or float32 [{n}, C]", self.y)
        for key in _MASKS:
            mask = getattr(self, key)
            _expect(mask.dtype == torch.bool and mask.shape == (n,), key, f"bool [{n}]", mask)
        edges = self.edge_index
        pairs = edges.dtype == torch.int64 and edges.dim() == 2 and len(edges) == 2
        _expect(pairs, "edge_index", "int64 [2, E]", edges)
        if edges.numel():
            low, high = (int(value) for value in edges.aminmax())
            if low < 0 or high >= n:
                raise ValueError(f"edge_index: expected node ids in 0..{n - 1}, got {low}..{high}")

    @property
    def num_nodes(self) -> int:
        """Number of nodes N."""
        return self.x.shape[0]

    @property
    def num_edges(self) -> int:
        """Number of directed edges E; an undirected edge counts twice."""
        return self.edge_index.shape[1]

    @property
    def num_features(self) -> int:
        """Number of features F of a node."""
        return self.x.shape[1]

    @property
    def multi_label(self) -> bool:
        """Whether a node may carry several labels (``y`` is float32 [N, C])."""
        return self.y.dim() == 2

    @property
    def num_classes(self) -> int:
        """Number of classes (or of labels, for multi-label data)."""
        if self.multi_label:
            return self.y.shape[1]
        return int(self.y.max()) + 1 if self.y.numel() else 0

    def __repr__(self) -> str:
        masks = (self.train_mask, self.val_mask, self.test_mask)
        return (
            f"Dataset({self.name}: {self.num_nodes} nodes, {self.num_edges} edges, "
            f"{self.num_features} features, {self.num_classes} {'labels' if self.multi_label else 'classes'}, "
            f"{'/'.join(str(int(mask.sum())) for mask in masks)} train/val/test)"
        )


def row_normalize(x: Tensor) -> Tensor:
    r"""Scale each row of features to a sum of at most one.

        x'[i, f] = (x[i, f] - m) / max(1, sum_k (x[i, k] - m)),    m the least value of x

    For bags of words m = 0: every row of ones is divided by its sum, a row of zeros stays zero.

    Args:
        x: floating point [N, F].

    Returns:
        A new tensor of the same shape and dtype.

    Source: ``torch_geometric.transforms.NormalizeFeatures``, whose numbers these are.
    """
    if not x.numel():
        return x.clone()
    x = x - x.min()
    return x.div_(x.sum(dim=-1, keepdim=True).clamp_(min=1.0))


def known_names(root: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """List the names that `load` accepts.

    Args:
        root: folder of ``.npz`` files; the environment variable ``GAS_TRITON_DATA`` if not given.

    Returns:
        ``"generated"``, the files found, then the names that torch_geometric and ogb would download.
    """
    files = _npz_files(_data_root(root))
    downloads = tuple(name for name in (*_PYG, *_PYG_SETS, *_OGB) if _key(name) not in files)
    return ("generated", *(path.stem for path in files.values()), *downloads)


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: int = 0,
    normalize_features: bool | None = None,
) -> Dataset:
    """Load a dataset by name: generated, a ``NAME.npz`` file, or through torch_geometric or ogb.

    A file is preferred to a download. Its keys: ``edge_index`` [2, E] (row 0 = source), ``x`` [N, F] or the
    CSR parts ``x_data``, ``x_indices``, ``x_indptr``, ``x_shape``, ``y`` [N] or [N, C], and ``train_mask``,
    ``val_mask``, ``test_mask``, each [N] or [N, splits]. Edges are taken as they are stored, except that
    ogbn-arxiv, a directed graph, is made symmetric when it is downloaded.

    PPI, CLUSTER and PATTERN are sets of graphs. They become one graph without edges between them, whose masks are those
    of the graphs that are trained on, validated with and tested on. In training, nodes of the last two are computed in
    their batches, without labels: nothing of theirs reaches a training node but the statistics of batch norm. (PyGAS
    trains on the training graphs alone.)

    Args:
        name: one of `known_names()`; case, ``-`` and ``_`` do not matter.
        root: folder of the files and of the downloads; if not given, the environment variable
            ``GAS_TRITON_DATA``, else ``~/.cache/gas_triton``.
        split: which published split. Coauthor and Amazon have none: the number seeds a draw of 20 training and
            30 validation nodes a class, the rest being test nodes (Shchur et al. 2018). The masks of a file
            come first.
        normalize_features: True applies `row_normalize`, False leaves the features as published, None
            does what the experiments of the GNNAutoScale paper do: rows of Cora, CiteSeer and PubMed are
            normalised, features of Reddit2 and Yelp standardised (mean 0, deviation 1), all others left.

    Returns:
        The `Dataset`, on the CPU.

    Raises:
        ValueError: the name is unknown, the split does not exist, or a file does not hold the keys above.
        MissingPackageError: the dataset needs torch_geometric or ogb and it is not installed.
        RuntimeError: torch_geometric or ogb could not download or read the dataset.

    Source: the splits and features of ``torch_geometric_autoscale/data.py`` in PyGAS.
    """
    key, folder = _key(name), _data_root(root)
    files = _npz_files(folder)
    pyg = {_key(known): known for known in (*_PYG, *_PYG_SETS)}
    ogb = {_key(known): known for known in _OGB}
    if key == "generated":
        return _dataset(vars(generate()), "generated", split, normalize_features)
    if key in files:
        return _dataset(_read_npz(files[key]), files[key].stem, split, normalize_features)
    if key not in pyg and key not in ogb:
        known = ", ".join(known_names(root))
        raise ValueError(f"dataset name: expected one of {known} (.npz files from {folder}), got {name!r}")
    name = pyg.get(key) or ogb[key]
    # Imported before the try: a missing package is not a failed download. ogb needs torch_geometric for its graphs.
    package = _import("torch_geometric.datasets", name, folder)
    package = package if key in pyg else _import("ogb.nodeproppred", name, folder)
    try:
        fields = _read_pyg(package, name, folder) if key in pyg else _read_ogb(package, name, folder)
    except Exception as error:  # whatever their download, archive and pickle layers raise
        raise RuntimeError(
            f"{name}: {package.__name__} could not download or read it under {folder} "
            f"({type(error).__name__}: {error}); without a network, put the file {name}.npz there"
        ) from error
    return _dataset(fields, name, split, normalize_features)


def _dataset(fields: dict[str, Any], name: str, split: int, normalize_features: bool | None) -> Dataset:
    """Choose the split and scale the features."""
    key, y = _key(name), fields["y"]
    y = y.flatten() if y.dim() == 2 and y.shape[1] == 1 else y
    y = y.long() if y.dim() == 1 else y.float()
    masks = {part: fields[part] for part in _MASKS if part in fields}
    splits = max((mask.shape[1] if mask.dim() == 2 else 1 for mask in masks.values()), default=0)
    if split < 0 or (split >= splits and key not in _UNSPLIT):
        raise ValueError(f"split: {name} has {splits} (from 0 to {splits - 1}), got {split}")
    if split >= splits:
        masks = _shchur_split(y, split)
    # WikiCS has 20 training sets and one test set: a mask without a split dimension belongs to every split.
    masks = {part: mask[:, split] if mask.dim() == 2 else mask for part, mask in masks.items()}
    masks = {part: mask.bool().contiguous() for part, mask in masks.items()}
    x = fields["x"].float()
    if normalize_features or (normalize_features is None and key in _ROW_NORMALIZED):
        x = row_normalize(x)
    elif normalize_features is None and key in _STANDARDIZED:
        x = (x - x.mean(dim=0)) / x.std(dim=0).clamp_(min=1e-12)
    return Dataset(name, fields["edge_index"].long().contiguous(), x.contiguous(), y.contiguous(), **masks)


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        wanted = ["edge_index", "y", *_MASKS]
        wanted += ["x"] if "x" in file else ["x_data", "x_indices", "x_indptr", "x_shape"]
        missing = [key for key in wanted if key not in file]
        if missing:
            raise ValueError(f"{path.name}: expected keys {', '.join(wanted)}, got no {', '.join(missing)}")
        fields: dict[str, Any] = {key: torch.from_numpy(file[key]) for key in wanted}
    if "x" not in fields:
        rows, columns = (int(size) for size in fields["x_shape"])
        row = torch.repeat_interleave(torch.arange(rows), fields["x_indptr"].long().diff())
        index = (row, fields["x_indices"].long())
        fields["x"] = torch.zeros(rows, columns).index_put_(index, fields["x_data"].float(), accumulate=True)
    return fields


def _read_pyg(package: ModuleType, name: str, root: Path) -> dict[str, Any]:
    if name in _PYG_SETS:
        return _read_pyg_set(package, name, root)
    class_name, arguments = _PYG[name]
    data = getattr(package, class_name)(str(root / class_name), **arguments)[0]
    keys = ["edge_index", "x", "y"] if _key(name) in _UNSPLIT else ["edge_index", "x", "y", *_MASKS]
    fields = {key: data[key] for key in keys}
    if name == "WikiCS":
        # Its authors keep one set to stop training and one for hyperparameters; PyGAS uses the former.
        fields["val_mask"] = data["stopping_mask"]
    return fields


def _read_pyg_set(package: ModuleType, name: str, root: Path) -> dict[str, Any]:
    class_name, arguments = _PYG_SETS[name]
    folder = str(root / class_name)
    splits = {part: getattr(package, class_name)(folder, **arguments, split=part) for part in ("train", "val", "test")}
    graphs = [(part, data) for part, graphs in splits.items() for data in graphs]
    sizes = torch.tensor([len(data["x"]) for _, data in graphs])
    offsets = (sizes.cumsum(0) - sizes).tolist()
    edges = [data["edge_index"] + offset for (_, data), offset in zip(graphs, offsets, strict=True)]
    fields = {
        "edge_index": torch.cat(edges, dim=1),
        "x": torch.cat([data["x"] for _, data in graphs]),
        "y": torch.cat([data["y"] for _, data in graphs]),
    }
    for part in splits:
        is_part = torch.tensor([part == of for of, _ in graphs])
        fields[f"{part}_mask"] = is_part.repeat_interleave(sizes)
    return fields


def _read_ogb(package: ModuleType, name: str, root: Path) -> dict[str, Any]:
    pyg = importlib.import_module("torch_geometric.data.data")
    storage = importlib.import_module("torch_geometric.data.storage").GlobalStorage
    # ogb opens the graph that it has stored with the safe default of torch.load, which knows no Data.
    with torch.serialization.safe_globals([pyg.Data, pyg.DataEdgeAttr, pyg.DataTensorAttr, storage]):
        dataset = package.PygNodePropPredDataset(name, str(root / "OGB"))
        data, index = dataset[0], dataset.get_idx_split()
    edge_index = _symmetrize(data.edge_index, data.num_nodes) if name == "ogbn-arxiv" else data.edge_index
    fields = {"edge_index": edge_index, "x": data.x, "y": data.y}
    for key, part in zip(_MASKS, ("train", "valid", "test"), strict=True):
        fields[key] = torch.zeros(data.num_nodes, dtype=torch.bool)
        fields[key][torch.as_tensor(index[part])] = True
    return fields


def _symmetrize(edge_index: Tensor, num_nodes: int) -> Tensor:
    source, target = edge_index.long()
    code = torch.unique(torch.cat([source * num_nodes + target, target * num_nodes + source]))
    return torch.stack([code // num_nodes, code % num_nodes])


def _shchur_split(y: Tensor, seed: int) -> dict[str, Tensor]:
    """Draw 20 training and 30 validation nodes a class (Shchur et al. 2018, "Pitfalls of GNN evaluation")."""
    rng = np.random.default_rng(seed)
    masks = {key: torch.zeros(len(y), dtype=torch.bool) for key in ("train_mask", "val_mask")}
    for label in range(int(y.max()) + 1):
        nodes = torch.from_numpy(rng.permutation(np.flatnonzero(y.numpy() == label)))
        masks["train_mask"][nodes[:20]] = True
        masks["val_mask"][nodes[20:50]] = True
    return masks | {"test_mask": ~(masks["train_mask"] | masks["val_mask"])}


def _import(module: str, name: str, root: Path) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingPackageError(
            f"{name} needs {package} ({error}): pip install 'gas-triton[pyg]', or put {name}.npz into {root}"
        ) from error


def _data_root(root: str | os.PathLike[str] | None) -> Path:
    return Path(root or os.environ.get("GAS_TRITON_DATA") or "~/.cache/gas_triton").expanduser()


def _npz_files(folder: Path) -> dict[str, Path]:
    return {_key(path.stem): path for path in sorted(folder.glob("*.npz"))}


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _expect(condition: bool, name: str, expected: str, value: Tensor) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value.dtype} {list(value.shape)}")
