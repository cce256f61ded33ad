"""The README's programs run as they stand, on a smaller graph."""

import importlib.util
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
def test_the_programs_in_the_readme_run_one_after_the_other(capsys):
    learn, scale, stage, compensate = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    smaller = learn.replace("num_nodes=20_000, num_edges=400_000", "num_nodes=4_000, num_edges=80_000")
    assert smaller != learn
    names = {"__name__": "readme"}
    exec(compile(smaller, str(README), "exec"), names)
    accuracy = float(re.search(r"tensor\((\d\.\d+)\)", capsys.readouterr().out).group(1))
    assert accuracy > 0.8

    if importlib.util.find_spec("torch_geometric") is not None:
        exec(compile(scale, str(README), "exec"), names)
        assert names["logits"].shape == (4_000, names["data"].num_classes)
        names["histories"].close()

    # the loop's `...` stands for a step
    exec(compile(stage.replace("    ...", "    model(batch.features, batch)"), str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"conv2 +4000 +64 +bfloat16 +pinned", printed)
    assert "'pulls': 4, " in printed
    assert "'misses': 0, " in printed

    exec(compile(compensate, str(README), "exec"), names)
    assert names["out"].shape == (names["batch"].num_nodes, names["data"].num_classes)
