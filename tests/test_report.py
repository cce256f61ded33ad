"""The tables of the READMEs: what they say of given results, and that those in the repository are up to date."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import bench_ceilings, pivot, records, report, report_goals, report_tables
from bench.pivot import MISSED
from bench.roofline import Ceilings

COMMANDS = {"cpu": "python -m bench.cpu", "gpu": "python -m bench.gpu"}
PYGAS = "PyGAS"


def row(way: str, ms: float, **more: Any) -> dict[str, Any]:
    """A row of the base case of `aggregate`."""
    keys = {"pass": "forward", "features": 128, "dtype": "float32", "reduce": "sum", "halo": 0.25, "degrees": "uniform"}
    values = {key: more.pop(key, value) for key, value in keys.items()}
    return {"op": "aggregate", **values, "way": way, "ms": ms, "times_ours": ms / 4.0, **more}


def part(rows: list[dict[str, Any]], kind: str = "cpu", date: str = "2026-11-22", **more: Any) -> records.Part:
    """Rows as a part of a file."""
    known = {"status": "ok", "size": "full", "seconds": 1.0, "reason": None}
    return records.Part(command=COMMANDS[kind], machine=f"a {kind}, 2 cores", date=date, rows=rows, **known | more)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with two READMEs and no results."""
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("before\n\n<!-- table highlights -->\nold\n<!-- end -->\n\nafter\n")
    names = ["cpu goals", "cpu aggregate", "gpu goals", "gpu tables"]
    text = "\n\n".join(f"prose {name}\n\n<!-- table {name} -->\n<!-- end -->" for name in names)
    (tmp_path / "bench/README.md").write_text(text + "\n")
    return tmp_path


def write(root: Path, name: str, **parts: records.Part) -> None:
    records.write(root / "bench/results" / name, "a device", parts)


def run(root: Path, *arguments: str) -> int:
    return report.main(["--root", str(root), *arguments])


def block(root: Path, name: str, file: str = "bench/README.md") -> str:
    """What stands between the markers of a name."""
    text = (root / file).read_text().split(f"<!-- table {name} -->")[1]
    return text.split("<!-- end -->")[0].strip()


# --- files -----------------------------------------------------------------------------------------------------------


def test_tables_of_the_repository_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    code = report.main(["--check"])
    assert code == 0, f"run `python -m bench.report`:\n{''.join(capsys.readouterr())}"


def test_a_table_replaces_what_stood_between_its_markers(root: Path) -> None:
    write(root, "a.json", aggregate=part([row("gas_triton", 4.0, gbps=57.1234), row(PYGAS, 39.8)]))
    assert run(root) == 0
    assert block(root, "cpu aggregate").splitlines() == [
        "| way | time | GB/s | times ours |",
        "| --- | --- | --- | --- |",
        "| gas_triton | 4 ms | 57.1 | 1.00x |",
        "| PyGAS | 39.8 ms |  | 9.9x |",
        "",
        "All: pass forward, features 128, dtype float32, reduce sum, halo share 25 %, degrees uniform.",
        "",
        "<sub>a cpu, 2 cores; 2026-11-22; `python -m bench.cpu`</sub>",
    ]
    text = (root / "README.md").read_text()
    assert text.startswith("before\n\n<!-- table highlights -->\n")
    assert text.endswith("<!-- end -->\n\nafter\n")
    assert "old" not in text
    assert "| aggregation, forward (20k rows x 25 edges x 128) | 4 ms | PyGAS's way 39.8 ms |" in text
    made = {name: (root / name).read_text() for name in report.FILES}
    assert run(root) == 0
    assert made == {name: (root / name).read_text() for name in report.FILES}


def test_check_shows_what_would_change_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (root / "README.md").read_text()
    assert run(root, "--check") == 1
    shown = capsys.readouterr().out
    assert "\n-old\n" in shown
    assert "+| what | gas_triton | against | command |" in shown
    assert (root / "README.md").read_text() == before
    run(root)
    assert run(root, "--check") == 0


def test_without_results_a_table_names_the_command(root: Path) -> None:
    run(root)
    assert block(root, "cpu aggregate") == "Not measured: `python -m bench.cpu --only aggregate`"
    missing = block(root, "gpu tables")
    assert missing.startswith("Not measured: `python -m bench.gpu --only ")
    assert {"aggregate", "attention", "step", "prefetch", "plan", "memory"} <= set(missing.strip("`").split())
    assert "epoch" not in missing.strip("`").split(), "the GPU's suite has no such part"


@pytest.mark.parametrize("size", ["quick", "tiny"])
def test_results_of_another_size_are_refused(root: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(root, "a.json", aggregate=part([row("gas_triton", 4.0)], size=size))
    before = (root / "bench/README.md").read_text()
    assert run(root) == 2
    assert f"a.json: aggregate was measured with size {size}" in capsys.readouterr().err
    assert (root / "bench/README.md").read_text() == before


def test_an_unknown_table_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "README.md").write_text("<!-- table cpu nonsense -->\n<!-- end -->\n")
    assert run(root) == 2
    assert "'cpu nonsense': expected one of highlights" in capsys.readouterr().err


def test_the_newest_file_of_each_kind_counts(root: Path) -> None:
    # the names' order is not that of the dates
    write(root, "a.json", aggregate=part([row("gas_triton", 2.0)], date="2026-12-01"))
    write(root, "b.json", aggregate=part([row("gas_triton", 3.0)], date="2026-11-01"))
    write(root, "nvidia.json", aggregate=part([row("gas_triton", 0.5)], "gpu", date="2027-01-01"))
    run(root)
    assert "| 2 ms |" in block(root, "cpu aggregate")
    assert "3 ms" not in block(root, "cpu aggregate")
    assert "| 500 us |" in block(root, "gpu tables")
    assert "a gpu, 2 cores; 2027-01-01; `python -m bench.gpu`" in block(root, "gpu tables")


def test_a_part_that_did_not_end_says_so(root: Path) -> None:
    write(root, "a.json", aggregate=part([row("gas_triton", 4.0)], status="cut short", reason="after 1 of 9 cases"))
    run(root)
    assert "(cut short: after 1 of 9 cases)</sub>" in block(root, "cpu aggregate")


# --- goals -----------------------------------------------------------------------------------------------------------


def test_every_goal_without_a_result_is_not_measured(root: Path) -> None:
    run(root)
    for kind, goals in report_goals.GOALS.items():
        lines = block(root, f"{kind} goals").splitlines()[2:]
        assert len(lines) == len(goals)
        assert all(f"| not measured | `python -m bench.{kind} --only " in line for line in lines)


def test_goals_are_met_or_missed_by_the_worst_case(root: Path) -> None:
    cpu = [row("gas_triton", 4.0), row(PYGAS, 21.0), row("embedding_bag over cat", 6.0)]
    write(root, "a.json", aggregate=part(cpu))
    wide = [
        row("gas_triton", 1.0, features=features, light=light, degrees="power law")
        for features, light in ((64, 0.83), (128, 0.79), (32, 0.65))
    ]
    others = [row("torch.sparse.mm over cat", 16.0, features=64), row("embedding_bag over cat", 5.0, features=64)]
    steps = [
        {"op": "step", "model": "GCN", "histories": tier, "way": way, "ms": 1.0, "times_ours": ratio}
        for tier, ratio in (("device", 3.5), ("pinned", 4.9))
        for way in ("gas_triton", "PyGAS's way")
    ]
    layers = [
        {
            "op": "attention",
            "pass": "forward + backward",
            "in": 64,
            "way": way,
            "ms": ms,
            "times_ours": ms,
            "peak_mib": peak,
        }
        for way, ms, peak in (("gas_triton", 1.0, 10.0), ("torch_geometric", 3.2, 39.0))
    ]
    memory = [
        {"op": "memory", "nodes": n, "way": "gas_triton", "arithmetic": off} for n, off in ((1, -0.12), (2, 0.05))
    ]
    write(
        root, "nvidia.json", aggregate=part(wide + others, "gpu"), step=part(steps, "gpu"),
        attention=part(layers, "gpu"), memory=part(memory, "gpu"),
    )  # fmt: skip
    run(root)
    cpu_lines, gpu_lines = (block(root, f"{kind} goals") for kind in ("cpu", "gpu"))
    assert "| `aggregate`, forward: times over PyGAS's way | >= 5x | 5.2x | met |" in cpu_lines
    assert f"| `aggregate`, forward: times over one `embedding_bag` | >= 2x | 1.50x | {MISSED} |" in cpu_lines
    assert f"100k rows x 15 and x 50 | >= 80 % | 79 % | {MISSED} |" in gpu_lines
    assert "| `aggregate`, forward: the same at F = 32 | >= 60 % | 65 % | met |" in gpu_lines
    assert "`torch.sparse.mm` | >= 3x | 4.0x | met |" in gpu_lines
    assert "on the device: times over PyGAS's way | >= 3x | 3.5x | met |" in gpu_lines
    assert f"in host memory: times over PyGAS's way | >= 5x | 4.9x | {MISSED} |" in gpu_lines
    assert "times over PyG's | >= 3x | 3.2x | met |" in gpu_lines
    assert f"PyG's peak memory over ours | >= 4x | 3.9x | {MISSED} |" in gpu_lines
    assert f"| <= 10 % | -12 % | {MISSED} |" in gpu_lines


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write, value, text",
    [
        (pivot.number, 2_100_000, "2 100 000"),
        (pivot.number, 9999, "9999"),
        (pivot.number, 1234.5, "1234"),
        (pivot.number, 0.0306, "0.0306"),
        (pivot.number, 57.1234, "57.1"),
        (pivot.number, 0.00001234, "0.000012"),
        (pivot.duration, 0.0451, "45.1 us"),
        (pivot.duration, 999.9, "1 s"),
        (pivot.duration, 4271.0, "4.27 s"),
        (pivot.memory, 58.149, "58.1 MiB"),
        (pivot.memory, 1568.6, "1.53 GiB"),
        (pivot.times, 1.374, "1.37x"),
        (pivot.times, 17.84, "17.8x"),
        (pivot.times, 251.8, "252x"),
        (pivot.share, 0.9431, "94 %"),
        (pivot.share, 0.0012, "0.12 %"),
        (pivot.exponent, -1e-9, "0.00"),
    ],
)
def test_numbers_have_the_digits_that_count(write: Any, value: float, text: str) -> None:
    assert write(value) == text


def test_a_comparison_has_a_line_a_case_and_a_column_a_way() -> None:
    def layer(heads: int, way: str, ms: float, **more: Any) -> dict[str, Any]:
        return {"op": "attention", "in": 64, "heads": heads, "way": way, "ms": ms, "times_ours": ms / 2.0, **more}

    rows = [
        layer(1, "gas_triton", 2.0, peak_mib=10.0),
        layer(1, "PyG", 9.0, peak_mib=25.0, target=">= 5x our time", met=False),
        layer(8, "gas_triton", 2.0, peak_mib=10.0),
        layer(8, "plain", 3.0),
        {"op": "attention", "in": 64, "heads": 8, "way": "PyG", "missing": "needs torch_geometric"},
    ]
    assert pivot.comparison(rows, others=("times_ours", "peak_times_ours")).splitlines() == [
        "| heads | our time | PyG | plain |",
        "| --- | --- | --- | --- |",
        f"| 1 | 2 ms | 4.5x, memory 2.5x (>= 5x our time: {MISSED}) |  |",
        "| 8 | 2 ms |  | 1.50x |",
        "",
        "All: in 64.",
        "",
        "PyG: not measured, needs torch_geometric.",
    ]
    best = pivot.comparison([*rows, layer(8, "slow", 7.0)], best=True).splitlines()
    assert best[0] == "| heads | our time | fastest other way |"
    assert best[3] == "| 8 | 2 ms | plain: 1.50x |"


def test_a_listing_has_a_line_a_row() -> None:
    rows = [
        {"op": "memory", "nodes": n, "way": "gas_triton", "peak_mib": 58.15, "partition": "random", **more}
        for n, more in ((50_000, {}), (800_000, {"growth": 0.0, "target": "within 1 %", "met": True}))
    ]
    assert pivot.listing(rows, ["peak_mib", "growth", "absent"]).splitlines() == [
        "| nodes | peak memory | growth | target |",
        "| --- | --- | --- | --- |",
        "| 50 000 | 58.1 MiB |  |  |",
        "| 800 000 | 58.1 MiB | 0 % | within 1 %: met |",
        "",
        "Clusters were drawn at random: pymetis was not installed.",
    ]


def test_base_case_is_the_first_in_every_pass() -> None:
    rows = [
        row("gas_triton", 1.0, features=features, **{"pass": which})
        for features in (128, 64)
        for which in ("forward", "forward + backward")
    ]
    assert pivot.base_case(rows) == rows[:2]


def test_failed_checks_are_shown() -> None:
    rows = [{"op": op, "case": str(ok), "ok": ok, "tolerance": 1.0} for op, ok in (("pull", True), ("push", False))]
    assert report_tables.checks(rows).splitlines()[2:] == ["| pull | 1 | 1 |", f"| push | 1 | 0 {MISSED} |"]


def test_memory_has_a_line_a_model_and_a_column_a_way(root: Path) -> None:
    def used(layers: int, way: str, mib: float | None, share: float | None = None, reason: str = "") -> dict[str, Any]:
        nbytes = None if mib is None else int(mib * 2**20)
        known = {"way": way, "model": "GCN", "layers": layers, "hidden": 64, "step_bytes": nbytes}
        return {**known, "device_bytes": 2 * 2**20, "edges_used": share, "reason": reason}

    rows = [used(2, "full", 80.0, 1.0), used(2, "cluster", 9.0, 0.4), used(3, "full", None, reason="out of memory")]
    (root / "bench/results/memory-cpu.json").write_text(json.dumps({"dataset": "small", "nodes": 12_000, "rows": rows}))
    text = report_tables.memory_table(report_tables.read_results(root / "bench/results"))
    assert text.splitlines() == [
        "| layers | full-batch | Cluster-GCN |",
        "| --- | --- | --- |",
        "| 2 | 80 MiB + 2 MiB, 100 % | 9 MiB + 2 MiB, 40 % |",
        "| 3 | out of memory |  |",
        "",
        "<sub>small; 12 000 nodes; `gas-triton memory`, memory-cpu.json</sub>",
    ]


def test_scale_has_slopes_points_and_figures(root: Path) -> None:
    point = {"op": "scale", "curve": "nodes", "nodes": 1000, "way": "device", "ms": 5.0, "epoch_s": 0.5}
    slope = {"op": "scale", "curve": "nodes", "of": "peak_mib", "way": "device", "slope": 0.001}
    write(root, "a.json", scale=part([point, slope]))
    write(root, "scale-large.json", scale=part([{**point, "nodes": 10**8}, {**slope, "slope": 0.02}]))
    (root / "bench/results/scale-amd.svg").touch()
    text = report_tables.scale(report_tables.read_results(root / "bench/results"), "cpu")
    assert "| 0.00 |" in text
    assert "| 0.02 |" in text
    assert "nodes 100 000 000" in text
    assert text.endswith("![scale-amd](results/scale-amd.svg)")


def test_ceilings_are_rows() -> None:
    rows = bench_ceilings.rows_of(Ceilings(20.0, 60.0, 2**20, 0.5))
    assert {row["ceiling"]: (row.get("gbps"), row.get("tflops"), row.get("size_mib")) for row in rows} == {
        "copy": (20.0, None, None),
        "cached gather": (60.0, None, None),
        "cache": (None, None, 1.0),
        "matmul": (None, 0.5, None),
    }
