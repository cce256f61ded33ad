"""The README's programs run as they stand, on a smaller graph."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def programs() -> list[str]:
    first, *others = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    smaller = first.replace("num_nodes=20_000, num_edges=400_000", "num_nodes=4_000, num_edges=80_000")
    assert smaller != first
    return [smaller, *others]


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_the_programs_in_the_readme_run_one_after_the_other(capsys):
    learn, _, stage, compensate = programs()
    names = {"__name__": "readme"}
    exec(compile(learn, str(README), "exec"), names)
    accuracy = float(re.search(r"tensor\((\d\.\d+)\)", capsys.readouterr().out).group(1))
    assert accuracy > 0.8

    # the loop's `...` stands for a step
    exec(compile(stage.replace("    ...", "    model(batch.features, batch)"), str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"conv2 +4000 +64 +bfloat16 +pinned", printed)
    assert "'pulls': 4, " in printed
    assert "'misses': 0, " in printed

    exec(compile(compensate, str(README), "exec"), names)
    assert names["out"].shape == (names["batch"].num_nodes, names["data"].num_classes)


@pytest.mark.interop
def test_the_program_with_a_pyg_model_runs(torch_geometric):
    learn, scale, *_ = programs()
    names = {"__name__": "readme"}
    exec(compile(learn.replace("range(10)", "range(1)"), str(README), "exec"), names)
    exec(compile(scale, str(README), "exec"), names)
    exact = names["pyg"](names["x"], names["loader"].full())
    assert (names["logits"] - exact).abs().max() < 1e-4
    assert list(names["histories"]) == ["convs.1", "convs.2"]
