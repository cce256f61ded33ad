"""`PNAConv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gas_triton import functional
from gas_triton.batch import Batch
from gas_triton.functional import Features, MultiReduce
from gas_triton.functional.multi_aggregate import aggregate_messages, check_reduces, source_rows, target_rows
from gas_triton.functional.rows import in_batch_rows
from gas_triton.graph import Graph
from gas_triton.nn.base import Halo, HistoryLayer, check_channels
from gas_triton.nn.edge_attr import check_edge_attr

SCALERS = ("identity", "amplification", "attenuation", "linear", "inverse_linear")


class PNAConv(HistoryLayer):
    r"""Principal neighbourhood aggregation (Corso et al., NeurIPS 2020), reading halo neighbours from a history.

    `out_i = W post(h_i, S(d_i) (x) [aggr_k_{j in N(i)} pre(h_i, h_j, e_ij)]_k)` for each tower, with S the scalers, d_i
    the number of neighbours. Parameters have the names and shapes of `torch_geometric.nn.PNAConv`, so a `state_dict`
    fits both ways.

    With one pre-layer and no edge features, messages are `W_i h_i + W_j h_j + b`: every row, halo rows among them, is
    transformed once, and nothing of the size of the edges is made. With edge features, or with more pre-layers,
    messages are made edge by edge, [E, towers * F] values.

    Args:
        in_channels: F_in.
        out_channels: F_out.
        aggregators: among "sum" ("add"), "mean", "min", "max", "var" and "std".
        scalers: among "identity", "amplification", "attenuation", "linear" and "inverse_linear".
        deg: [D], how many nodes have 0, 1, ... neighbours; `degree_histogram(graph)`.
        edge_dim: width of the edge features.
        towers: number of towers, whose outputs are concatenated.
        pre_layers: linear layers before the aggregation.
        post_layers: linear layers after it.
        divide_input: each tower reads its share of the features instead of all.
        act: activation between layers, a module or the name of one in torch.nn.
        act_kwargs: arguments of the named activation.
        train_norm: whether the mean degrees that scalers divide by are trained.
        input_dropout: see `HistoryLayer`.
        halo: see `HistoryLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        aggregators: Sequence[str],
        scalers: Sequence[str],
        deg: Tensor,
        edge_dim: int | None = None,
        towers: int = 1,
        pre_layers: int = 1,
        post_layers: int = 1,
        divide_input: bool = False,
        act: str | nn.Module | None = "relu",
        act_kwargs: Mapping[str, Any] | None = None,
        train_norm: bool = False,
        *,
        input_dropout: float = 0.0,
        halo: Halo = "read",
    ) -> None:
        super().__init__(input_dropout, halo)
        self.in_channels = check_channels("in_channels", in_channels)
        self.out_channels = check_channels("out_channels", out_channels)
        self.aggregators = cast(list[MultiReduce], check_reduces("aggregators", aggregators))
        self.scalers = check_scalers(scalers)
        self.edge_dim = None if edge_dim is None else check_channels("edge_dim", edge_dim)
        self.towers = check_channels("towers", towers)
        self.pre_layers = check_channels("pre_layers", pre_layers)
        self.post_layers = check_channels("post_layers", post_layers)
        for name, value in (("in_channels", in_channels if divide_input else towers), ("out_channels", out_channels)):
            if value % towers:
                raise ValueError(f"{name} must be a multiple of towers={towers}, got {value}")
        self.divide_input = divide_input
        self.F_in = in_channels // towers if divide_input else in_channels
        self.F_out = out_channels // towers
        self.aggr_module = DegreeScaler(self.scalers, deg, train_norm)
        if edge_dim is not None:
            self.edge_encoder = nn.Linear(edge_dim, self.F_in)
        self.pre_nns, self.post_nns = nn.ModuleList(), nn.ModuleList()
        num_blocks = len(self.aggregators) * len(self.scalers) + 1
        for _ in range(towers):
            width = (2 if edge_dim is None else 3) * self.F_in
            self.pre_nns.append(_perceptron(width, self.F_in, pre_layers, act, act_kwargs))
            self.post_nns.append(_perceptron(num_blocks * self.F_in, self.F_out, post_layers, act, act_kwargs))
        self.lin = nn.Linear(out_channels, out_channels)

    @property
    def history_dim(self) -> int:
        return self.in_channels

    def reset_parameters(self) -> None:
        """New parameters from torch's default for linear layers; the mean degrees as they were given."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()

    def forward(self, x: Tensor | Features, batch: Batch, edge_attr: Tensor | None = None) -> Tensor:
        """[B, F_out] of `x`: [B + H, F_in], [B, F_in] with a history, or `batch.features`.

        Args:
            x: rows, see above.
            batch: the plan of the step.
            edge_attr: [num_edges, edge_dim] in the batch's edge order, `edge_attr_of_graph[batch.edge_ids]`.
        """
        edge_attr = check_edge_attr("PNAConv", batch, edge_attr, self.edge_dim, is_needed=True)
        source = self.read(x, batch)
        rows = source.rows()
        own = in_batch_rows(rows, batch)
        count = count_neighbours(batch, self.halo)
        if self.pre_layers == 1 and edge_attr is None:
            neighbours = self._first(rows, 1).flatten(1)
            out = functional.multi_aggregate(neighbours, batch, reduces=self.aggregators, halo=self.halo)
            out = self._add_own(out, self._first(own, 0).flatten(1), count)
        else:
            out = self._aggregate_messages(rows, own, batch, edge_attr, count)
        return self._after(own, out.unflatten(2, (self.towers, self.F_in)), count)

    def _first_layers(self) -> list[nn.Linear]:
        return [cast(nn.Linear, tower[0]) for tower in cast(Sequence[nn.Sequential], self.pre_nns)]

    def _first(self, rows: Tensor, block: int) -> Tensor:
        """What the first pre-layers make of one of their inputs, with the bias beside the first, [R, towers, F]."""
        layers = self._first_layers()
        columns = slice(block * self.F_in, (block + 1) * self.F_in)
        weight = torch.stack([layer.weight[:, columns] for layer in layers])
        bias = torch.cat([layer.bias for layer in layers]) if block == 0 else None
        if not self.divide_input:
            return F.linear(rows, weight.flatten(0, 1), bias).unflatten(1, (self.towers, self.F_in))
        out = torch.einsum("rtf,tgf->rtg", rows.unflatten(1, (self.towers, self.F_in)), weight)
        return out if bias is None else out + bias.view(self.towers, self.F_in)

    def _add_own(self, out: Tensor, own: Tensor, count: Tensor) -> Tensor:
        """Aggregations [B, K, F] of messages that have `own` added: a deviation stays, and a row of none stays 0."""
        has_any = (count > 0).to(own.dtype)
        times = {"sum": count.to(own.dtype), "var": torch.zeros_like(has_any), "std": torch.zeros_like(has_any)}
        factor = torch.stack([times.get(name, has_any) for name in self.aggregators], dim=1)
        return torch.addcmul(out, factor[:, :, None], own[:, None])

    def _aggregate_messages(
        self, rows: Tensor, own: Tensor, batch: Batch, edge_attr: Tensor | None, count: Tensor
    ) -> Tensor:
        message = source_rows(self._first(rows, 1).flatten(1), batch, self.halo)
        if edge_attr is not None:
            encoder = self.edge_encoder
            # two linear layers in a row are one
            weight = torch.cat([layer.weight[:, 2 * self.F_in :] for layer in self._first_layers()])
            message = message + F.linear(edge_attr[: message.size(0)], weight @ encoder.weight, weight @ encoder.bias)
        first = self._first(own, 0).flatten(1)
        if self.pre_layers == 1:
            out = aggregate_messages(message, batch, self.aggregators, self.halo)
            return self._add_own(out, first, count)
        message = message + target_rows(first, batch, self.halo)
        towers = message.unflatten(1, (self.towers, self.F_in)).unbind(1)
        pre_nns = cast(Sequence[nn.Sequential], self.pre_nns)
        message = torch.cat([pre_nn[1:](h) for pre_nn, h in zip(pre_nns, towers, strict=True)], dim=1)
        return aggregate_messages(message, batch, self.aggregators, self.halo)

    def _after(self, own: Tensor, aggregated: Tensor, count: Tensor) -> Tensor:
        """The post-layers, of own rows [B, F_in] and aggregations [B, K, towers, F]."""
        scale = self.aggr_module(count).to(own.dtype)
        outs = []
        for tower, post_nn in enumerate(cast(Sequence[nn.Sequential], self.post_nns)):
            x = own[:, tower * self.F_in : (tower + 1) * self.F_in] if self.divide_input else own
            layer = cast(nn.Linear, post_nn[0])
            of_own, of_scaled = layer.weight.tensor_split([self.F_in], dim=1)
            # a scaler is a factor of the row: scaling what the layer makes of the aggregations saves copies of them
            weight = of_scaled.unflatten(1, (len(self.scalers), -1)).transpose(0, 1).flatten(0, 1)
            parts = F.linear(aggregated[:, :, tower].flatten(1), weight).unflatten(1, (len(self.scalers), -1))
            h = F.linear(x, of_own, layer.bias) + torch.einsum("bs,bsf->bf", scale, parts)
            outs.append(post_nn[1:](h))
        return self.lin(torch.cat(outs, dim=1))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, towers={self.towers}, edge_dim={self.edge_dim}"


class DegreeScaler(nn.Module):
    """Factors of a row by its number of neighbours, [B, S]; the state of PyG's `DegreeScalerAggregation`.

    Args:
        scalers: S names.
        deg: [D], how many nodes have 0, 1, ... neighbours.
        train_norm: whether the mean degrees are parameters.
    """

    avg_deg_lin: Tensor
    avg_deg_log: Tensor

    def __init__(self, scalers: Sequence[str], deg: Tensor, train_norm: bool = False) -> None:
        super().__init__()
        self.scalers = list(scalers)
        self.init_avg_deg_lin, self.init_avg_deg_log = mean_degrees(deg)
        for name in ("avg_deg_lin", "avg_deg_log"):
            if train_norm:
                self.register_parameter(name, nn.Parameter(torch.empty(1)))
            else:
                self.register_buffer(name, torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The mean degrees as they were given."""
        self.avg_deg_lin.data.fill_(self.init_avg_deg_lin)
        self.avg_deg_log.data.fill_(self.init_avg_deg_log)

    def forward(self, count: Tensor) -> Tensor:
        count = count.to(self.avg_deg_lin.dtype)
        # PyG: no neighbour counts as one where it would be divided by
        at_least_one = count.clamp(min=1)
        factors = {
            "identity": lambda: torch.ones_like(count),
            "amplification": lambda: count.log1p() / self.avg_deg_log,
            "attenuation": lambda: self.avg_deg_log / at_least_one.log1p(),
            "linear": lambda: count / self.avg_deg_lin,
            "inverse_linear": lambda: self.avg_deg_lin / at_least_one,
        }
        return torch.stack([factors[name]() for name in self.scalers], dim=1)


def degree_histogram(graph: Graph) -> Tensor:
    """How many nodes of a graph have 0, 1, ... neighbours, int64 [D]."""
    return torch.bincount(graph.rowptr.diff())


def count_neighbours(batch: Batch, halo: Halo) -> Tensor:
    """Neighbours of each in-batch row, [B]."""
    count = batch.inner.rowptr.diff()
    return count if halo == "drop" else count + batch.outer.rowptr.diff()


def mean_degrees(deg: Tensor) -> tuple[float, float]:
    """The means of d and of log(d + 1) over the nodes of a degree histogram."""
    deg = torch.as_tensor(deg).double()
    if deg.dim() != 1 or not bool((deg >= 0).all()) or not bool((deg[1:] > 0).any()):
        raise ValueError(
            f"deg must be a histogram [D] of degrees with an edge somewhere, got shape {list(deg.shape)} with "
            f"{int(deg.sum())} nodes; see degree_histogram"
        )
    degree = torch.arange(deg.numel(), dtype=deg.dtype, device=deg.device)
    num_nodes = int(deg.sum())
    return float((degree * deg).sum()) / num_nodes, float((degree.log1p() * deg).sum()) / num_nodes


def check_scalers(scalers: Sequence[str], known: Sequence[str] = SCALERS) -> list[str]:
    """The names as a list, if they are known."""
    if isinstance(scalers, str) or not scalers or any(name not in known for name in scalers):
        raise ValueError(f"scalers must be a list of one or more of {', '.join(known)}, got {scalers!r}")
    return list(scalers)


def _perceptron(
    in_channels: int,
    out_channels: int,
    num_layers: int,
    act: str | nn.Module | None,
    act_kwargs: Mapping[str, Any] | None,
) -> nn.Sequential:
    modules: list[nn.Module] = [nn.Linear(in_channels, out_channels)]
    for _ in range(num_layers - 1):
        modules += [_activation(act, act_kwargs), nn.Linear(out_channels, out_channels)]
    return nn.Sequential(*modules)


def _activation(act: str | nn.Module | None, act_kwargs: Mapping[str, Any] | None) -> nn.Module:
    if act is None:
        return nn.Identity()
    if isinstance(act, nn.Module):
        return act
    if isinstance(act, str):
        wanted = act.lower().replace("-", "").replace("_", "").replace(" ", "")
        for name, kind in vars(nn.modules.activation).items():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and name.lower() == wanted:
                return kind(**(act_kwargs or {}))
    raise ValueError(f"act must be a module or the name of an activation in torch.nn, got {act!r}")
