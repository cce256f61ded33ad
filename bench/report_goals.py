"""The goals of the project and what of them was reached, and the lines of the table in README.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import accuracy
from bench.pivot import MISSED, Where, shown
from bench.report_tables import COMMAND, NOT_MEASURED, Results, absent, machine_of, present
from bench.tables import OURS, Row

# --- goals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What the project promises.

    Attributes:
        text: for the reader.
        part: of the suite, whose rows say whether it is met.
        where: which rows.
        key: of the column that counts, in the row where it is worst.
        least: what it must be at least.
        most: what its size must be at most.
    """

    text: str
    part: str
    where: Where
    key: str
    least: float | None = None
    most: float | None = None

    def line(self, results: Results, kind: str) -> str:
        """A line of a table."""
        limit = self.least if self.most is None else self.most
        bound = f"{'>=' if self.most is None else '<='} "
        bound += f"{limit:g}x" if self.key.endswith("times_ours") else shown({self.key: limit}, self.key)
        rows = [row for row in results.rows(kind, self.part, self.where) if row.get(self.key) is not None]
        if not rows:
            return f"| {self.text} | {bound} | {NOT_MEASURED} | `{COMMAND[kind]} --only {self.part}` |"
        worst = min(rows, key=lambda row: row[self.key]) if self.most is None else max(rows, key=self._size)
        is_met = worst[self.key] >= self.least if self.least is not None else self._size(worst) <= (self.most or 0.0)
        return f"| {self.text} | {bound} | {shown(worst, self.key)} | {'met' if is_met else MISSED} |"

    def _size(self, row: Row) -> float:
        return abs(row[self.key])


# PyG's layer, and the same in plain torch: a bare machine has only that, and where both are there the worse counts.
PYG_WAYS = ("torch_geometric", "PyG's way")
FORWARD, BOTH = "forward", "forward + backward"
PYG, PYGAS, BAG, SPARSE = "torch_geometric", "PyGAS", "embedding_bag over cat", "torch.sparse.mm over cat"


def aggregate(which: str, way: str = OURS, **more: object) -> Where:
    """Rows of float32 sums whose degrees follow a power law or are all the same."""
    same = {"dtype": "float32", "reduce": "sum", "halo": (None, 0.25), "degrees": (None, "uniform", "power law")}
    return {"pass": which, "way": way, **same, **more}


def base_row(which: str, way: str) -> Where:
    """The rows of the base case on a CPU."""
    return aggregate(which, way, features=128, degrees=(None, "uniform"))


def at_least_64(features: object) -> bool:
    """For wide rows."""
    return isinstance(features, int) and features >= 64


GOALS: dict[str, list[Goal]] = {
    "gpu": [
        *(
            Goal(f"`aggregate`, {which}: share of the speed of light, F >= 64, 100k rows x 15 and x 50", "aggregate",
                 aggregate(which, features=at_least_64), "light", least=0.8)
            for which in (FORWARD, BOTH)
        ),
        *(
            Goal(f"`aggregate`, {which}: the same at F = 32", "aggregate", aggregate(which, features=32), "light",
                 least=0.6)
            for which in (FORWARD, BOTH)
        ),
        *(
            Goal(f"`aggregate`, {which}: times over {text}", "aggregate", aggregate(which, way, features=at_least_64),
                 "times_ours", least=least)
            for which in (FORWARD, BOTH)
            for way, text, least in (
                (SPARSE, "`index_select` + `cat` + `torch.sparse.mm`", 3.0), (BAG, "one `embedding_bag`", 1.3)
            )
        ),
        Goal("GATConv, forward + backward: times over PyG's", "attention", {"pass": BOTH, "way": PYG_WAYS},
             "times_ours", least=3.0),
        Goal("GATConv, forward + backward: PyG's peak memory over ours", "attention", {"pass": BOTH, "way": PYG_WAYS},
             "peak_times_ours", least=4.0),
        Goal("PNA's five aggregators, forward + backward: times over PyG's", "multi_aggregate",
             {"pass": BOTH, "way": PYG_WAYS, "kind": (None, "aggregations")}, "times_ours", least=4.0),
        *(
            Goal(f"training step of a 3-layer GCN, 256 wide, histories {place}: times over PyGAS's way", "step",
                 {"model": "GCN", "histories": tier, "way": lambda way: str(way).startswith("PyGAS")}, "times_ours",
                 least=least)
            for tier, place, least in (("device", "on the device", 3.0), ("pinned", "in host memory", 5.0))
        ),
        Goal("transfer time hidden in an epoch, float32 tables in host memory, fetched ahead", "prefetch",
             {"way": "pinned, ahead", "dtype": "float32"}, "hidden", least=0.95),
        Goal("transfer time hidden in a training step", "step", {"model": "GCN", "histories": "pinned", "way": OURS},
             "hidden", least=0.95),
        Goal("memory of a step: away from the arithmetic of (B + H)·F", "memory", {}, "arithmetic", most=0.1),
        Goal("memory of a step: growth with 16 times the nodes", "memory", {}, "growth", most=0.01),
    ],
    "cpu": [
        Goal("`aggregate`, forward: times over PyGAS's way", "aggregate", base_row(FORWARD, PYGAS), "times_ours",
             least=5.0),
        Goal("`aggregate`, forward + backward: times over PyGAS's way", "aggregate", base_row(BOTH, PYGAS),
             "times_ours", least=3.0),
        Goal("`aggregate`, forward: times over one `embedding_bag`", "aggregate", base_row(FORWARD, BAG),
             "times_ours", least=2.0),
        Goal("epoch of a 3-layer GCN, 256 wide: times over PyGAS's own code", "epoch",
             {"graph": "generated", "dropout": 0.0, "way": PYGAS}, "times_ours", least=3.0),
        Goal("plan over training step", "plan", {"share": present}, "share", most=0.1),
        Goal("memory of a step: growth with 16 times the nodes", "memory", {}, "growth", most=0.01),
        *(
            Goal(f"`diagnose` over one exact inference, {text}", "diagnostics", {"graph": graph, "way": "diagnose"},
                 "times_ours", most=2.0)
            for graph, text in (("like Cora", "3k nodes"), ("like PubMed", "20k nodes"), ("larger", "100k nodes"))
        ),
    ],
}  # fmt: skip


def goals_table(results: Results, kind: str) -> str:
    """The goals of a kind of device, a line each."""
    lines = [goal.line(results, kind) for goal in GOALS[kind]]
    return "\n".join(["| goal | target | reached | |", "| --- | --- | --- | --- |", *lines])


# --- the table of README.md ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Highlight:
    """A line of the table in README.md.

    Attributes:
        text: what was measured.
        part: of the suite.
        ours: which row is ours.
        against: the other rows, by what they are called.
        keys: columns that are shown.
    """

    text: str
    part: str
    ours: Where
    against: dict[str, Where]
    keys: Sequence[str] = ("ms",)

    def line(self, results: Results) -> str:
        """A line of a table."""
        command = f"`{COMMAND['cpu']} --only {self.part}`"

        def cell(where: Where) -> str:
            rows = results.rows("cpu", self.part, where)
            return ", ".join(filter(None, (shown(rows[0], key) for key in self.keys))) if rows else ""

        ours = cell(self.ours)
        others = ", ".join(f"{name} {found}" for name, where in self.against.items() if (found := cell(where)))
        return f"| {self.text} | {ours or NOT_MEASURED} | {others} | {command} |"


TIME_AND_MEMORY = ("ms", "peak_mib")
HIGHLIGHTS = [
    *(
        Highlight(f"aggregation, {which} (20k rows x 25 edges x 128)", "aggregate", base_row(which, OURS),
                  {"PyGAS's way": base_row(which, PYGAS), "one `embedding_bag`": base_row(which, BAG)})
        for which in (FORWARD, BOTH)
    ),
    Highlight("`GATConv`, 8 heads x 8, forward and backward", "attention",
              {"pass": BOTH, "way": OURS, "in": 64, "heads": 8, "features": 8},
              {"PyG": {"pass": BOTH, "way": PYG, "in": 64, "heads": 8, "features": 8}}, TIME_AND_MEMORY),
    Highlight("`PNAConv`, five aggregations, F = 64", "multi_aggregate",
              {"kind": "PNAConv", "features": 64, "pass": BOTH, "way": OURS},
              {"PyG": {"kind": "PNAConv", "features": 64, "pass": BOTH, "way": PYG}}, TIME_AND_MEMORY),
    Highlight("a PyG layer wrapped by `autoscale`: GATConv with a history", "autoscale",
              {"layer": "GATConv", "rows": "with history", "way": OURS},
              {"the layer itself": {"layer": "GATConv", "rows": "with history", "way": "layer as it is"}}),
    Highlight("epoch of a 3-layer GCN, 256 wide, 100k nodes, 2M edges", "epoch",
              {"graph": "generated", "dropout": 0.0, "way": OURS},
              {"PyGAS's way": {"graph": "generated", "dropout": 0.0, "way": PYGAS}}, TIME_AND_MEMORY),
    Highlight("such an epoch with histories in files, rows fetched ahead", "prefetch",
              {"dtype": "float32", "way": "file, ahead"},
              {"pulled when asked": {"dtype": "float32", "way": "file, when asked"},
               "on the device": {"dtype": "float32", "way": "device"}}),
    Highlight("planning a batch", "plan", {"clusters": 4, "way": OURS, "against": absent},
              {"PyGAS's C++": {"clusters": 4, "way": PYGAS},
               "`k_hop_subgraph`": {"clusters": 4, "way": "k_hop_subgraph"}}),
    Highlight("peak memory of a step, 50k nodes", "memory", {"nodes": lambda nodes: (nodes or 0) < 100_000},
              {"800k nodes": {"nodes": lambda nodes: (nodes or 0) > 100_000}}, ("peak_mib",)),
    Highlight("anonymous memory with 4 GB of histories in files", "file_tier", {"growth_mb": present},
              {"with 4 MB of them": {"growth_mb": absent}}, ("anonymous_mb",)),
]  # fmt: skip


def highlights(results: Results) -> str:
    """The table "Measured" of README.md."""
    lines = ["| what | gas_triton | against | command |", "| --- | --- | --- | --- |"]
    lines += [line.line(results) for line in HIGHLIGHTS]
    runs = accuracy.Record(results.folder / "accuracy-cpu.json")
    for name in ("Cora", "PubMed"):
        cells = {way: accuracy.summary(runs, name, way) for way in ("int8", "histories", "full-batch")}
        names = {"histories": "in float32", "full-batch": "full-batch"}
        against = ", ".join(f"{text} {cells[way]}" for way, text in names.items() if cells[way])
        what = f"{name}, 2-layer GCN with histories in int8: test accuracy"
        lines.append(f"| {what} | {cells['int8'] or NOT_MEASURED} | {against} | `python -m bench.accuracy` |")
    part = next(iter(results.parts.get("cpu", {}).values()), None)
    return "\n".join(lines) + (f"\n\n<sub>{machine_of(part)}; {part.date}</sub>" if part else "")
