"""Every Triton kernel compiles for Ampere and Hopper without spills, with 16-byte row loads, in its registers."""

from pathlib import Path

import pytest

from . import compiled

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.fixture(scope="module", params=compiled.ARCHITECTURES)
def rows(request):
    """What became of every kernel; compiled once for all tests."""
    return compiled.compile_all(request.param)


def test_no_kernel_spills_or_loads_narrowly(rows):
    wrong = [f"{row['kernel']}: {', '.join(row['wrong'])}" for row in rows if row["wrong"]]
    assert not wrong, "\n".join(wrong)
    functions = {row["function"] for row in rows}
    defined = {
        line.removeprefix("def ").split("(")[0]
        for path in KERNELS.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert functions == defined


def test_kernels_take_what_they_took(rows):
    expected, version = compiled.read(), rows[0]["triton"]
    if expected["triton"] != version:
        pytest.skip(
            f"{compiled.EXPECTED.name} was compiled with Triton {expected['triton']} and this is {version}: only "
            f"limits are checked. Install that one, or accept what this one makes with: {compiled.ACCEPT}"
        )
    changed = compiled.differences(rows, expected)
    assert not changed, "\n".join([*changed, f"to accept this: {compiled.ACCEPT}"])


def test_a_change_of_what_a_kernel_takes_is_named():
    expected = compiled.read()
    rows = [
        {"kernel": name, "arch": int(arch), **facts}
        for name, of_arch in expected["kernels"].items()
        for arch, facts in of_arch.items()
        if arch == "90"
    ]
    assert compiled.differences(rows, expected) == []
    before, first, gone = rows[0]["registers"], rows[0]["kernel"], rows.pop()["kernel"]
    rows[0] = rows[0] | {"registers": before - 2}
    rows.append(rows[1] | {"kernel": "another"})
    assert compiled.differences(rows, expected) == [
        f"{first}, sm_90: registers {before} -> {before - 2}",
        "another, sm_90: not known before",
        f"{gone}, sm_90: not compiled any more",
    ]


def test_what_was_compiled_is_kept(tmp_path):
    rows = [
        {"kernel": name, "arch": arch, "triton": "3.9.0", "wrong": [], **dict.fromkeys(compiled.FACTS, arch)}
        for name in ("sum", "max")
        for arch in (80, 90)
    ]
    path = tmp_path / "compiled.json"
    compiled.write(rows, path)
    assert compiled.differences(rows[::2], compiled.read(path)) == []
    # some alone leave the others
    compiled.write([row | {"registers": 5} for row in rows[2:]], path, keep=True)
    found = compiled.read(path)["kernels"]
    assert [found[name]["90"]["registers"] for name in ("sum", "max")] == [90, 5]
    with pytest.raises(ValueError, match=r"compiled.json is of Triton 3.9.0 and this is 3.6.0: compile all kernels"):
        compiled.write([row | {"triton": "3.6.0"} for row in rows], path, keep=True)
    with pytest.raises(ValueError, match="no kernel was compiled"):
        compiled.write([], path, keep=True)


def test_the_gate_finds_what_is_wrong():
    too_large, narrow = compiled.compile_all("--controls", "90")
    assert any("spills" in reason for reason in too_large["wrong"])
    assert any("row loads of 16 bytes" in reason for reason in narrow["wrong"])
