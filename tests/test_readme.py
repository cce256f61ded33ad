"""The README's program runs as it stands, on a smaller graph."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_program_in_the_readme_learns(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    smaller = program.replace("num_nodes=20_000, num_edges=400_000", "num_nodes=4_000, num_edges=80_000")
    assert smaller != program
    exec(compile(smaller, str(README), "exec"), {"__name__": "readme"})
    accuracy = float(re.search(r"tensor\((\d\.\d+)\)", capsys.readouterr().out).group(1))
    assert accuracy > 0.8
