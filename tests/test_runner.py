"""The suite's runner: every part from a bare checkout, and what a part that goes wrong does to the others."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import groups, records, runner, side_by_side, worker
from bench.runner import PARTS, Entry
from gas_triton import memory

ROOT = Path(__file__).parent.parent
# What a machine with a GPU may lack, and no part may need.
ABSENT = ("pymetis", "tqdm", "pytest", "torch_sparse", "torch_scatter", "torch_geometric", "scipy", "matplotlib")
ABSENT += ("hypothesis", "ogb", "pytest_benchmark")
BLOCKER = f"""
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_no_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {ABSENT!r} else find_spec(name, path, target)

PathFinder.find_spec = find_no_spec
"""


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of what is needed, that nobody has installed, and the environment of a machine with torch alone."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("bench", "gas_triton", "kernels"):
        leave = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / "checkout" / name, symlinks=True, ignore=leave)
    (folder / "blocker").mkdir()
    (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(folder / "blocker"), "OMP_NUM_THREADS": "1"}
    return SimpleNamespace(path=folder / "checkout", environment=environment)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_part_runs_in_a_bare_checkout(checkout, kind, tmp_path):
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    path = tmp_path / "found.json"
    names = [name for name, entry in PARTS.items() if kind in entry.devices]
    module = "bench.cpu" if kind == "cpu" else "bench.gpu"
    done = subprocess.run(
        [sys.executable, "-m", module, "--tiny", "--json", path, "--only", *names],
        cwd=checkout.path, env=checkout.environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    parts = records.read(path)
    assert {name: (part.status, part.reason) for name, part in parts.items()} == dict.fromkeys(names, ("ok", None))
    assert all(part.rows for part in parts.values())
    assert all(part.command.startswith(f"python -m {module} --tiny --json ") for part in parts.values())
    text = path.with_suffix(".md").read_text()
    assert all(f"\n## {name}\n" in text for name in names)
    # the end of the output says it all
    assert all(f"\n{name}: ok in " in done.stdout[-12_000:] for name in names)


def test_a_part_runs_from_another_folder_and_with_safe_paths(checkout, tmp_path):
    environment = checkout.environment | {
        "PYTHONPATH": os.pathsep.join([str(checkout.path), checkout.environment["PYTHONPATH"]]),
        "PYTHONSAFEPATH": "1",
    }
    path = tmp_path / "found.json"
    source = tmp_path / "source.py"
    source.write_text(
        "import sys, bench.runner, bench.worker\nbench.runner.PARTS = {'one': bench.runner.Entry('one')}\n"
    )
    source.write_text(source.read_text() + "sys.exit(bench.runner.main('cpu', None, sys.argv[1:]))\n")
    (tmp_path / "one.py").write_text(
        "import gas_triton\ndef measure(setting): return [{'op': 'one', 'way': gas_triton.__file__, 'ms': 1.0}]\n"
    )
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = subprocess.run(
        [sys.executable, source, "--tiny", "--json", path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert records.read(path)["one"].rows[0]["way"] == str(checkout.path / "gas_triton" / "__init__.py")


def test_kernels_run_in_the_interpreter(checkout, tmp_path):
    path = tmp_path / "found.json"
    # the first part checks all kernels, the second is one that measures
    command = [
        sys.executable,
        "-m",
        "bench.cpu",
        "--tiny",
        "--interpret",
        "--json",
        path,
        "--only",
        "correctness",
        "push",
    ]
    done = subprocess.run(
        command, cwd=checkout.path, env=checkout.environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    content = json.loads(path.read_text())
    # of another machine than the CPU itself
    assert content["device"].endswith(" interpreting")
    rows = content["parts"]["correctness"]["rows"]
    assert {"aggregate", "attention", "dynamic_attention", "multi_aggregate", "push", "pull"} <= {r["op"] for r in rows}


# --- parts that go wrong ---------------------------------------------------------------------------------------------

CASES = """
from bench.groups import Case, Group, measure_cases
import os, signal, time
import torch

def case(number, work):
    return Case("op", {"case": f"case {number}"}, lambda: Group({"gas_triton": work}))

def fine():
    return torch.ones(2)

def wrong():
    raise ValueError("wrong answer")
"""
MODULES = {
    "good": "def measure(setting): return measure_cases([case(k, fine) for k in range(3)], setting)",
    "partly": "def measure(setting): return measure_cases([case(0, fine), case(1, wrong), case(2, fine)], setting)",
    "raises": "def measure(setting): raise RuntimeError('CUDA error: made up')",
    "crashes": """
def measure(setting):
    rows = measure_cases([case(k, fine) for k in range(3)], setting)
    setting.progress.save(rows[:2])
    os.kill(os.getpid(), signal.SIGABRT)
""",
    "hangs": "def measure(setting): time.sleep(600)",
    "slow": """
def measure(setting):
    return measure_cases([case(k, lambda: time.sleep(0.2)) for k in range(900)], setting)
""",
    "odd": "def measure(setting): return [{'op': 'odd', 'way': 'x', 'ms': float('nan'), 'dtype': torch.float32}]",
    "breaks": """
import __main__
def measure(setting):
    # of the worker
    __main__.answers = lambda device: False
    return measure_cases([case(0, fine), case(1, wrong), case(2, fine)], setting)
""",
    "interrupted": "def measure(setting): raise SystemExit('left')",
}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Runs parts of `MODULES`; gives the status, and what was written."""
    for name, text in MODULES.items():
        (tmp_path / f"part_{name}.py").write_text(CASES + text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "found.json"

    def call(*names, arguments=(), shares=None):
        entries = {name: Entry(f"part_{name}", share=(shares or {}).get(name, 1.0)) for name in MODULES}
        monkeypatch.setattr(runner, "PARTS", entries)
        status = runner.main("cpu", None, ["--tiny", "--json", str(path), "--only", *names, *arguments])
        return status, records.read(path)

    call.path = path
    return call


def states(parts):
    return {name: part.status for name, part in parts.items()}


@pytest.fixture
def before(suite):
    """A part that an earlier run left in the file."""
    row = {"op": "op", "case": "case 0", "way": "gas_triton", "ms": 1.0}
    part = records.Part("ok", "python -m bench.cpu", "a CPU", "2026-01-01", "tiny", 1.0, None, [row])
    records.write(suite.path, "a CPU", {"slow": part})
    return part


def test_what_goes_wrong_in_one_part_leaves_the_others(suite, before, capfd, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 1.0)
    names = ["raises", "crashes", "partly", "breaks", "interrupted", "hangs", "odd", "good"]
    # its share of the time ends at once
    status, parts = suite(*names, shares={"hangs": 1e-6})
    assert status == 1
    assert states(parts) == dict.fromkeys(names, "failed") | {"odd": "ok", "good": "ok", "slow": "ok"}
    assert parts["slow"] == before
    assert parts["raises"].reason.endswith("RuntimeError: CUDA error: made up")
    assert "status -6" in parts["crashes"].reason
    # where it was, from faulthandler
    assert "part_crashes.py" in parts["crashes"].reason
    assert "op, case 1: " in parts["partly"].reason
    assert parts["partly"].reason.endswith("ValueError: wrong answer")
    assert "did not answer any more" in parts["breaks"].reason
    assert "took too long" in parts["hangs"].reason
    # cases before and after the one that failed, and before the crash
    assert [row["case"] for row in parts["partly"].rows] == ["case 0", "case 2"]
    assert [row["case"] for row in parts["breaks"].rows] == ["case 0"]
    assert [row["case"] for row in parts["crashes"].rows] == ["case 0", "case 1"]
    assert parts["odd"].rows == [{"op": "odd", "way": "x", "ms": None, "dtype": "torch.float32"}]
    assert len(parts["good"].rows) == 3
    text = suite.path.with_suffix(".md").read_text()
    assert text.index("## raises") < text.index("RuntimeError: CUDA error: made up") < text.index("## good")
    out = capfd.readouterr().out
    assert "\nraises: failed in " in out[-3000:]
    assert "made up" in out[-3000:]


def test_no_case_begins_after_the_deadline(suite, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    names = ["slow", "raises"]
    # in this process: one of its own might spend the time on its imports
    job = worker.Job(
        "cpu", "tiny", 0.01, {name: f"part_{name}" for name in names}, {"slow": 1e6, "raises": 1.0},
        time.monotonic() + 3.0, 60.0, str(suite.path), str(tmp_path / "state"), "a CPU", "",
    )  # fmt: skip
    assert worker.work(job) == 0
    parts = records.read(suite.path)
    assert states(parts) == {"slow": "cut short"}
    count = len(parts["slow"].rows)
    assert parts["slow"].reason == f"cut short after {count} of 900 cases"
    assert 0 < count < 900


def test_no_part_begins_after_the_deadline(suite, before):
    status, parts = suite("raises", "slow", arguments=["--minutes", "1e-9"])
    assert status == 1
    assert (parts["raises"].status, parts["raises"].reason) == ("not run", "out of time")
    # what an earlier run measured stays
    assert parts["slow"] == before


def test_a_worker_that_cannot_start_is_reported(suite, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'bench.worker' in sys.orig_argv: raise SystemExit(9)\n")
    status, parts = suite("good", "odd")
    assert status == 1
    assert all("before its first part" in part.reason for part in parts.values())


def test_a_worker_ends_with_its_runner(suite, tmp_path):
    program = (
        "import sys; from bench import runner; from bench.runner import Entry\n"
        "runner.PARTS = {'hangs': Entry('part_hangs')}\n"
        f"runner.main('cpu', None, ['--tiny', '--json', {str(suite.path)!r}])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL)
    # the file is there, and empty, before anything runs
    while not (suite.path.exists() and records.read(suite.path)):
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{children[0]}").exists() and "Z" not in Path(f"/proc/{children[0]}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)
    # what it was doing is in the file
    assert states(records.read(suite.path)) == {"hangs": "running"}


def test_a_gpu_is_asked_for_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main("cuda", None, ["--quick"]) == 2
    assert "python -m bench.cpu" in capsys.readouterr().err


# --- what only a GPU runs --------------------------------------------------------------------------------------------


class FakeEvent:
    """As `torch.cuda.Event`: knows when it was recorded, and refuses to be read before a synchronisation."""

    now = 0.0
    synchronized = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self, stream=None):
        assert stream == "stream"
        self.at = FakeEvent.now

    def elapsed_time(self, end):
        assert FakeEvent.synchronized >= end.at, "not ready"
        return end.at - self.at


@pytest.fixture
def fake_cuda(monkeypatch):
    calls = []
    device = torch.device("cuda")

    def synchronize(which):
        assert which == device
        FakeEvent.synchronized = FakeEvent.now

    class Filler:
        def zero_(self):
            calls.append("fill")
            FakeEvent.now += 1000.0

    def empty(size, dtype, device):
        assert (dtype, device.type) == (torch.int8, "cuda")
        calls.append(size)
        return Filler()

    monkeypatch.setattr(side_by_side.torch, "empty", empty)
    for name, value in {
        "Event": FakeEvent, "synchronize": synchronize, "current_stream": lambda which: "stream",
        "get_device_properties": lambda which: SimpleNamespace(L2_cache_size=3 << 28),
        "get_device_name": lambda which: "NVIDIA H200", "empty_cache": lambda: calls.append("empty_cache"),
        "memory_allocated": lambda which: 1000, "max_memory_allocated": lambda which: 5096,
        "reset_peak_memory_stats": lambda which: calls.append("reset"),
    }.items():  # fmt: skip
        # each of these exists in torch
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    return calls


def test_a_gpu_is_timed_with_events_after_its_cache_is_filled(fake_cuda):
    def work(milliseconds, name):
        def call():
            fake_cuda.append(name)
            FakeEvent.now += milliseconds

        return call

    functions = {"a": work(2.0, "a"), "b": work(3.0, "b")}
    seconds = side_by_side.interleave(functions, rounds=2, warmup=1, device=torch.device("cuda"))
    assert seconds == {"a": [0.002, 0.002], "b": [0.003, 0.003]}
    assert fake_cuda == [6 << 28, "fill", "b", "fill", "a", "fill", "a", "fill", "b", "fill", "b", "fill", "a"]


def test_memory_and_machine_of_a_gpu(fake_cuda):
    device = torch.device("cuda")
    assert groups.peak_of(lambda: None, device) == 4096
    assert fake_cuda == ["reset"]
    assert side_by_side.machine(device).startswith("NVIDIA H200, CUDA ")
    worker.release(device)
    assert fake_cuda == ["reset", "empty_cache"]
    assert memory.peak_bytes is groups.peak_bytes


def test_a_device_that_does_not_answer_is_noticed(monkeypatch):
    assert worker.answers(torch.device("cpu"))

    def broken(*size, device):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker.torch, "ones", broken)
    assert not worker.answers(torch.device("cuda"))
