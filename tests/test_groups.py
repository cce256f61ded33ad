"""Cases, rows and files of results."""

import math
import time

import pytest
import torch

from bench import compiling, groups, records, runner, tables
from bench.groups import Case, Group, Progress, Setting, measure_cases
from bench.roofline import Traffic


def case(name, ours=lambda: torch.ones(3), theirs=lambda: torch.ones(3), **options):
    return Case("op", {"pass": name}, lambda: Group({"gas_triton": ours, "other": theirs}, **options))


def tiny(**options):
    return Setting(size="tiny", seconds=0.001, **options)


def test_rows_say_what_was_measured():
    traffic = Traffic(streamed=10_000_000)
    rows = measure_cases([case("forward", traffic=traffic, missing={"PyGAS": "not installed"})], tiny())
    ours, other, missing = rows
    assert [row["way"] for row in rows] == ["gas_triton", "other", "PyGAS"]
    assert all((row["op"], row["pass"]) == ("op", "forward") for row in rows)
    assert ours["times_ours"] == 1.0
    assert ours["difference"] == other["difference"] == 0.0
    assert ours["gbps"] == pytest.approx(0.01 / (ours["ms"] / 1e3))
    assert 0.0 < ours["fastest_ms"] <= ours["ms"]
    # 12 bytes
    assert ours["peak_mib"] * 2**20 == 12
    assert missing == {"op": "op", "pass": "forward", "way": "PyGAS", "missing": "not installed"}


def test_ways_that_disagree_are_refused():
    wrong = case("wrong", theirs=lambda: torch.ones(3) * 1.01)
    with pytest.raises(AssertionError, match=r"op, wrong: answers of other differ from ours by 9\.9e-03"):
        measure_cases([wrong], tiny())
    with pytest.raises(AssertionError):
        measure_cases([case("nan", theirs=lambda: torch.full((3,), math.nan))], tiny())
    with pytest.raises(AssertionError):
        measure_cases([case("nan", ours=lambda: torch.full((3,), math.nan))], tiny())


def test_progress_hears_of_every_case_and_the_deadline_ends_them():
    class Noting(Progress):
        def fail(self, case, error):
            self.failures.append(f"{case.title}: {error}")

    progress = Noting()
    wrong = case("wrong", theirs=lambda: torch.zeros(3))
    rows = measure_cases([case("a"), wrong, case("b")], tiny(progress=progress))
    assert [row["pass"] for row in rows] == ["a", "a", "b", "b"]
    assert progress.rows == rows
    assert [failure[:10] for failure in progress.failures] == ["op, wrong:"]
    assert progress.cut is None

    progress = Noting()
    setting = tiny(progress=progress, deadline=time.monotonic() + 0.3)
    slow = Group({"gas_triton": lambda: time.sleep(0.02)})
    rows = measure_cases([Case("op", {"case": str(k)}, lambda: slow) for k in range(100)], setting)
    assert 0 < len(rows) < 100
    assert progress.cut == f"cut short after {len(rows)} of 100 cases"


def test_command_line_of_a_part(monkeypatch, capsys):
    settings = []

    def measure(setting):
        settings.append(setting)
        return [{"op": "op", "way": "gas_triton", "ms": 1.5}]

    monkeypatch.setattr("sys.argv", ["x", "--device", "cpu", "--size", "tiny", "--seconds", "0.5"])
    groups.main("What it does.", measure)
    assert (settings[0].device, settings[0].size, settings[0].seconds) == (torch.device("cpu"), "tiny", 0.5)
    assert "gas_triton  1.500" in capsys.readouterr().out


CASE = {"op": "sum", "pass": "forward", "features": 128}
ROWS = [
    {**CASE, "way": "gas_triton", "ms": 1.25, "times_ours": 1.0, "light": 0.8, "rounds": 9},
    {**CASE, "way": "other", "ms": 2.5, "times_ours": 2.0, "light": None, "rounds": 9},
    {**CASE, "way": "PyGAS", "missing": "not | installed"},
    {"op": "plan", "way": "growth", "exponent": 1.05, "target": 1.1, "met": False},
    {"op": "check", "case": "a", "dtype": "float32", "value": "out", "error": 1e-7, "tolerance": 1e-6, "ok": True},
    {"op": "check", "case": "b", "dtype": "float32", "value": "out", "error": 2e-6, "tolerance": 1e-6, "ok": False},
    {
        "op": "check",
        "case": "c",
        "dtype": "float32",
        "error": None,
        "tolerance": 0.0,
        "ok": False,
        "failure": "Traceback\nit broke",
    },
]
CHECKED = [
    "check: 1 of 3 checks passed, at most 0.10 of the tolerance",
    "FAILED check, b, float32, out: error 2e-06, at worst -, over 1.0e-06",
    "FAILED check, c, float32: it broke",
]


def test_tables_for_a_terminal():
    assert tables.render(ROWS).splitlines() == [
        "sum, forward, features 128",
        "               ms  over ours  of light", "gas_triton  1.250      1.00x       80%",
        "other       2.500      2.00x         -", "PyGAS: not measured, not | installed", "", "plan",
        "        exponent  target    met", "growth      1.05     1.1  False", "", *CHECKED,
    ]  # fmt: skip


def test_headlines():
    assert tables.headlines(ROWS) == [
        "sum, forward, features 128: gas_triton 1.250 ms, 80% of light; other 2.00x",
        "plan: growth exponent 1.05 target 1.1 met False; MISSED",
        *CHECKED,
    ]


def test_tables_for_a_file():
    assert tables.markdown(ROWS).splitlines() == [
        "| op | pass | features | way | ms | over ours | of light | rounds | missing |",
        "| --- | --- | --- | --- | --: | --: | --: | --: | --- |",
        "| sum | forward | 128 | gas_triton | 1.250 | 1.00x | 80% | 9 |  |",
        "| sum | forward | 128 | other | 2.500 | 2.00x |  | 9 |  |",
        "| sum | forward | 128 | PyGAS |  |  |  |  | not \\| installed |",
        "", "| op | way | exponent | target | met |", "| --- | --- | --: | --: | --: |",
        "| plan | growth | 1.05 | 1.1 | False |", "",
        *(f"* {line}" for line in CHECKED),
    ]  # fmt: skip


def part(**options):
    known = {"status": "ok", "command": "python", "machine": "H200", "date": "today", "size": "full", "seconds": 1.0}
    return records.Part(**known | options)


def test_a_summary_is_short_and_ends_with_what_failed():
    rows = [{"op": "sum", "features": k, "way": "gas_triton", "ms": 1.0} for k in range(1000)]
    parts = {"sum": part(rows=rows), "plan": part(status="failed", reason="Traceback\n  line\nValueError: too bad")}
    text = runner.summary(parts)
    assert len(text) <= runner.SUMMARY
    assert text.splitlines()[0] == "sum: sum, features 0: gas_triton 1.000 ms"
    assert "the rest is in the files" in text
    assert text.splitlines()[-2:] == [
        "sum: ok in 1.0 s, 1000 rows",
        "plan: failed in 1.0 s, 0 rows: ValueError: too bad",
    ]


def test_files_of_results(tmp_path):
    path = tmp_path / "a" / "x.json"
    records.write(path, "H200", {"one": part(rows=[{"op": "x", "way": "y", "ms": 1.23456789, "error": math.inf}])})
    records.write(path, "H200", {"two": part(status="failed", reason="it broke")})
    found = records.read(path)
    assert list(found) == ["one", "two"]
    # NaN and infinity are no numbers of JSON
    assert found["one"].rows == [{"op": "x", "way": "y", "ms": 1.2346, "error": None}]
    text = records.markdown(path)
    assert text.startswith("# H200\n\n## one\n\n`python`, today, size full, 1 s: H200\n\n| op | way | ms | error |\n")
    assert text.endswith("failed:\n\n```\nit broke\n```\n")
    path.write_text('{"schema": 2, "parts": {}}')
    with pytest.raises(ValueError, match="expected results with schema 1"):
        records.read(path)
    assert records.default_path("NVIDIA H200", "2026-11-22").name == "nvidia-h200-2026-11-22.json"


def test_kernels_are_compiled_ahead_for_every_case() -> None:
    setting = Setting(size="tiny")
    (row,) = compiling.measure(setting)
    assert row["cases"] == len(compiling.all_cases(setting)) > 20
