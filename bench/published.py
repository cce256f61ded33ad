"""Published accuracies that were verified, to stand beside our own.

`GAS` has the paper's own GNNAutoScale cells (Fey et al., ICML 2021, table 1) as PaddlePaddle's PGL quotes them;
`PGL_METIS`, `PGL_RANDOM` and `PGL_FULL` are PGL's independent implementation. Cells of the paper that no source
confirms are not here.

Source: https://github.com/PaddlePaddle/PGL, apps/GNNAutoScale/README.md (commit 6dbb47c4).
"""

from __future__ import annotations

Cells = dict[tuple[str, str], tuple[float, float]]


def _cells(text: str) -> Cells:
    """(dataset, model) -> (mean, standard deviation) in points."""
    _, *names = text.splitlines()[1].split()
    cells: Cells = {}
    for line in text.splitlines()[2:]:
        model, *values = line.split()
        for name, value in zip(names, values, strict=True):
            mean, deviation = value.rstrip(")").split("(")
            cells[name, model] = float(mean), float(deviation)
    return cells


GAS = _cells("""
model Cora        CiteSeer    PubMed
GCN   82.29(0.76) 71.18(0.97) 79.23(0.62)
GAT   83.32(0.62) 71.86(1.00) 78.42(0.56)
APPNP 83.19(0.58) 72.63(0.82) 79.82(0.52)
GCN2  85.52(0.39) 73.89(0.48) 80.19(0.49)""")

PGL_METIS = _cells("""
model Cora        CiteSeer    PubMed
GCN   81.4(1.15)  70.86(0.93) 79.13(0.59)
GAT   82.93(1.27) 71.56(0.9)  77.76(0.45)
APPNP 83.94(0.55) 71.58(0.53) 80.4(0.28)
GCN2  83.91(0.54) 70.06(1.11) 79.93(0.48)""")

PGL_RANDOM = _cells("""
model Cora        CiteSeer    PubMed
GCN   78.12(1.28) 71.05(0.98) 78.47(0.44)
GAT   82.79(0.99) 71.5(0.65)  77.4(0.56)
APPNP 79.62(1.69) 70.35(1.3)  78.96(0.58)
GCN2  81.36(1.26) 70.96(1.08) 78.51(0.49)""")

PGL_FULL = _cells("""
model Cora        CiteSeer    PubMed
GCN   80.7(1.0)   71.0(0.7)   79.4(0.3)
GAT   83.4(0.4)   70.0(0.6)   77.2(0.4)
APPNP 84.6(0.3)   71.9(0.3)   80.3(0.2)
GCN2  84.6(0.3)   72.4(0.6)   79.8(0.3)""")
