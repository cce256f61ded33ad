"""`gas-triton partition`: its table, its JSON, what it recommends, and how it ends."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import gas_triton
from gas_triton import cli, partition_report
from gas_triton.datasets import generate

GENERATED = ["partition", "--dataset", "Generated", "--nodes", "600", "--edges", "6000"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a call prints; the errors where it is to fail."""
    assert cli.main(list(arguments)) == code
    printed = capsys.readouterr()
    return printed.out if code == 0 else printed.err


def cells(printed: str) -> list[list[str]]:
    """The rows of the table, columns apart by two spaces."""
    lines = printed.splitlines()
    (first,) = (place for place, line in enumerate(lines) if line.startswith("parts "))
    (last,) = (place for place, line in enumerate(lines) if line.startswith("a batch: clusters."))
    rows = [re.split(r" {2,}", line.strip()) for line in lines[first + 1 : last] if line[0].isdigit()]
    header = re.split(r" {2,}", lines[first].strip())
    assert all(len(row) == len(header) for row in rows)
    return rows


def test_metis_is_compared_with_random(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, *GENERATED, "--num-parts", "4", "10", "--batch-size", "2")
    assert printed.startswith("Dataset(generated: 600 nodes, 6000 edges")
    rows = cells(printed)
    assert [row[:4] for row in rows] == [
        ["4", "METIS", "2", "2"], ["4", "random", "2", "2"], ["10", "METIS", "2", "5"], ["10", "random", "2", "5"],
    ]  # fmt: skip
    for metis, random in (rows[:2], rows[2:]):
        assert float(metis[4].rstrip("%")) < float(random[4].rstrip("%"))
        assert int(metis[8]) < int(random[8])
    graph = gas_triton.Graph.from_edge_index(generate(600, 6000).edge_index, num_nodes=600)
    stats = gas_triton.metis(graph, 10).stats(2)
    shares = [stats.inter_intra_ratio, stats.balance]
    assert rows[2][4:10] == [
        f"{stats.edge_cut:.1%}", *(f"{share:.2f}" for share in shares), "120", f"{stats.halo_rows:.0f}",
        f"{stats.halo_ratio:.2f}",
    ]  # fmt: skip
    assert "a step: bytes that the largest step of GCN with 2 layers of 64 takes" in printed


def test_cora_as_text_and_json(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cora.json"
    options = ["--batch-size", "10", "0.5", "--num-parts", "40", "--model", "gat", "--hidden", "8", "--layers", "3"]
    command = ["partition", "--dataset", "cora", "--root", str(data_root), *options, "--json", str(path)]
    printed = run(capsys, *command, "--budget", "1GiB")
    rows = cells(printed)
    assert [row[:4] for row in rows] == [
        ["40", "METIS", "10", "4"], ["40", "random", "10", "4"], ["40", "METIS", "20", "2"], ["40", "random", "20", "2"]
    ]  # fmt: skip
    written = json.loads(path.read_text())
    assert (written["dataset"], written["nodes"], written["edges"], written["budget"]) == ("Cora", 2708, 10556, 2**30)
    assert (written["model"]["name"], written["model"]["layers"], written["model"]["hidden"]) == ("GAT", 3, 8)
    assert written["arguments"]["num_parts"] == [40]
    # the largest batches fit a GiB, and METIS has fewer halo rows
    assert (written["recommended"], written["advice"]) == (2, printed.splitlines()[-1])
    assert written["advice"].startswith("METIS in 40 parts, 20 a batch: the largest batches that fit 90% of 1.00 GiB")
    for row, record in zip(rows, written["records"], strict=True):
        assert row[9] == f"{record['halo_ratio']:.2f}"
        assert record["cost"]["step"] == record["step_bytes"] < record["device_bytes"]
        assert record["halo_rows"] / record["rows"] == pytest.approx(record["halo_ratio"])
    # a quarter of Cora's nodes in 10 clusters have about 290 neighbours outside
    assert 200 < written["records"][0]["halo_rows"] < 400 < 1000 < written["records"][1]["halo_rows"]


def test_without_part_counts_a_ladder_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    rows = cells(run(capsys, *GENERATED))
    assert [row[:2] for row in rows] == [
        ["1", "-"], *([str(parts), name] for parts in (2, 4, 8) for name in ("METIS", "random"))
    ]  # fmt: skip
    assert cells(run(capsys, *GENERATED, "--methods", "random", "--num-parts", "8"))[0][:2] == ["8", "random"]


def test_models_without_an_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, *GENERATED, "--num-parts", "8", "--model", "PNA")
    assert [row[10:12] for row in cells(printed)] == [["-", "-"], ["-", "-"]]
    assert "a step: not computed: PNA has no arithmetic (GCN, SAGE, GIN, GAT have)." in printed


def test_clusters_that_were_left_empty_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        partition_report.METHODS, "metis",
        lambda graph, parts, seed: gas_triton.contiguous_partition(graph, [200] * 3),
    )  # fmt: skip
    printed = run(capsys, *GENERATED, "--num-parts", "5")
    assert [row[0] for row in cells(printed)] == ["5 (3)", "5"]
    assert "(n): clusters made; METIS left the others empty." in printed


def test_without_pymetis_the_rest_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    printed = run(capsys, *GENERATED, "--num-parts", "4")
    assert [row[1] for row in cells(printed)] == ["random"]
    assert "not made: METIS: metis needs pymetis (" in printed
    assert "metis needs pymetis" in run(capsys, *GENERATED, "--num-parts", "4", "--methods", "metis", code=2)


def test_ctrl_c_shows_what_was_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metis = partition_report.METHODS["metis"]

    def interrupted(graph: Any, parts: int, seed: int) -> Any:
        if parts == 8:
            raise KeyboardInterrupt
        return metis(graph, parts, seed)

    monkeypatch.setitem(partition_report.METHODS, "metis", interrupted)
    path = tmp_path / "no.json"
    assert cli.main([*GENERATED, "--num-parts", "4", "8", "--json", str(path)]) == 130
    printed = capsys.readouterr()
    assert [row[:2] for row in cells(printed.out)] == [["4", "METIS"], ["4", "random"]]
    assert "largest batches" not in printed.out
    assert printed.err == "gas-triton: interrupted\n"
    assert not path.exists()
    assert cli.main([*GENERATED, "--num-parts", "8"]) == 130
    assert "parts" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-parts", "700"], "num_parts must be from 1 to the number of nodes (600), got 700"),
        (["--batch-size", "0"], "batch_size must be a number of clusters of at least 1"),
        (["--batch-size", "1.5"], "as a float in (0, 1], got 1.5"),
        (["--model", "mlp"], "model must be of GCN, SAGE"),
        (["--methods", "kmeans"], "methods must be of metis, random, got 'kmeans'"),
        (["--layers", "0"], "layers: expected a positive int, got 0"),
        (["--hidden", "-3"], "hidden: expected a positive int, got -3"),
        (["--dropout", "1.0"], "dropout: expected a probability in [0, 1), got 1.0"),
        (["--history-dtype", "int4"], "history_dtype must be of float32"),
        (["--history-tier", "tape"], "history_tier must be of device, pinned, file, got 'tape'"),
        (["--budget", "8"], "budget: expected a size such as 80GB or 24GiB, got '8'"),
        (["--budget", "8GB", "--model", "pna"], "model: with a budget expected one of GCN, SAGE, GIN, GAT, got 'PNA'"),
        (["--json", "nowhere/out.json"], "--json"),
    ],
)
def test_errors_name_the_argument(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_report, "_make", lambda *_, **__: pytest.fail("a partition was made"))
    assert message in run(capsys, *GENERATED, *arguments, code=2)
    with pytest.raises(SystemExit) as ended:
        cli.main([*GENERATED, "--batch-size", "many"])
    assert ended.value.code == 2
    assert "argument --batch-size: invalid number of clusters value: 'many'" in capsys.readouterr().err
