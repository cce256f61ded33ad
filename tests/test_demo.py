"""The demo runs from end to end on a small graph, and its table says what was measured."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import demo
from gas_triton.datasets import generate
from gas_triton.training import EpochRecord, Result, _Run


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    # Steps this small are slower on several threads, above all where other programs run.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_demo_ends_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--nodes", "4000", "--edges", "80000", "--epochs", "10"]) == 0
    printed = capsys.readouterr()
    pattern = r"^(histories|full-batch) +([\d.]+)% +([\d.]+) MiB +([\d.]+) MiB +([\d.]+) s$"
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in re.findall(pattern, printed.out, re.MULTILINE)}
    mlp = float(re.search(r"^MLP +([\d.]+)%$", printed.out, re.MULTILINE).group(1))
    assert list(rows) == ["histories", "full-batch"]
    assert rows["histories"][0] > mlp + 10
    assert rows["full-batch"][0] > mlp + 10
    assert rows["histories"][1] < rows["full-batch"][1] / 3
    tables = 2 * 4000 * (demo.CONFIG.hidden + 1) * 4
    assert (rows["histories"][2], rows["full-batch"][2]) == (pytest.approx(tables / 2**20, abs=0.05), 0.0)
    assert all(row[3] > 0 for row in rows.values())
    assert "1/10 of the\nnodes" in printed.out
    assert re.search(r"On .+, seed 0, in \d+ s\.$", printed.out.strip())
    for name in ("histories", "full-batch", "MLP"):
        assert re.search(rf"{name} *: 100%.*10/10", printed.err)
    # the only thing it leaves behind
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert kept.parent == tmp_path / "cache" / "gas_triton"
    assert kept.name.startswith("metis-")


def test_without_edges_a_gcn_is_an_mlp() -> None:
    data = generate(500, 4000, num_classes=3, num_features=6)
    alone = demo.without_edges(data)
    assert (data.num_edges, alone.num_edges) == (4000, 0)
    run = _Run(alone, replace(demo.CONFIG, full_batch=True, partition="random"), torch.device("cpu"), None)
    assert run.full is not None
    with torch.no_grad():
        out = run._forward(run.model.eval(), run.full)
        x = data.x[run.loader.parts.perm]
        for place, conv in enumerate(run.model.convs):
            x = conv.lin(x if place == 0 else x.relu()) + conv.bias
    torch.testing.assert_close(out, x)


def test_ctrl_c_prints_no_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "train", lambda *args, **kwargs: Result(interrupted=True))
    assert demo.main(["--nodes", "500", "--edges", "4000", "--epochs", "1"]) == 130
    out = capsys.readouterr().out
    assert "interrupted: no table" in out
    assert "test accuracy" not in out


def test_the_table_shows_the_results_it_is_given() -> None:
    def result(test_acc: float, peak: int, tables: int) -> Result:
        result = Result(peak_bytes=peak * 2**20, history_bytes=tables * 2**20)
        result.add(EpochRecord(1, 0.5, 0.25, 0.1, test_acc))
        return result

    results = {"histories": result(0.91, 3, 5), "full-batch": result(0.92, 40, 0), "MLP": result(0.5, 30, 0)}
    lines = demo.summary(results, demo.CONFIG).splitlines()
    assert lines[1].split() == ["histories", "91.00%", "3.0", "MiB", "5.0", "MiB", "0.250", "s"]
    assert lines[2].split() == ["full-batch", "92.00%", "40.0", "MiB", "0.0", "MiB", "0.250", "s"]
    assert lines[3].split() == ["MLP", "50.00%"]
