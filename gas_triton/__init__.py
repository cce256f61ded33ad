"""Training graph neural networks on graphs that do not fit on the GPU, with historical embeddings."""

from gas_triton import datasets, functional, models, nn
from gas_triton.autoscale import autoscale
from gas_triton.batch import Batch
from gas_triton.checkpoint import load_checkpoint, save_checkpoint
from gas_triton.compensation import Compensated
from gas_triton.diagnostics import diagnose
from gas_triton.errors import MissingPackageError, NonFiniteError
from gas_triton.functional import Features, SparseRows
from gas_triton.graph import Graph
from gas_triton.history import Histories, HistoryStore, attach_histories
from gas_triton.inference import inference
from gas_triton.loader import ClusterLoader
from gas_triton.partition import Partition, contiguous_partition, metis, random_partition

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ClusterLoader",
    "Compensated",
    "Features",
    "Graph",
    "Histories",
    "HistoryStore",
    "MissingPackageError",
    "NonFiniteError",
    "Partition",
    "SparseRows",
    "attach_histories",
    "autoscale",
    "contiguous_partition",
    "datasets",
    "diagnose",
    "functional",
    "inference",
    "load_checkpoint",
    "metis",
    "models",
    "nn",
    "random_partition",
    "save_checkpoint",
]
