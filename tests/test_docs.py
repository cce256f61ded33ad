"""The pages build without a warning, name everything that is public, and their programs, commands and links work."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gas_triton
import gas_triton.diagnostics
from gas_triton.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
GUIDE = ROOT / "docs/guide"
# files at the root that the repository's reader sees first
READ = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


# --- the reference ---------------------------------------------------------------------------------------------------


def resolve(identifier: str) -> Any:
    """What a dotted name stands for: a module where there is one of that name, else an attribute of its parent."""
    try:
        return importlib.import_module(identifier)
    except ModuleNotFoundError:
        parent, _, name = identifier.rpartition(".")
        return getattr(resolve(parent), name)


def directives() -> Iterator[str]:
    """Every name that a page asks the docstring of, the chosen members of modules among them."""
    for page in PAGES:
        for found in re.finditer(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text() + "\n", re.MULTILINE):
            identifier, options = found.groups()
            yield identifier
            if members := re.search(r"members: \[(.*)\]", options):
                yield from (f"{identifier}.{name.strip()}" for name in members[1].split(","))


def test_every_name_on_a_page_is_there() -> None:
    names = list(directives())
    assert len(names) > 50
    for name in names:
        assert resolve(name) is not None, name


@pytest.mark.parametrize(
    "module",
    [
        gas_triton,
        gas_triton.nn,
        gas_triton.models,
        gas_triton.functional,
        gas_triton.history,
        gas_triton.datasets,
        gas_triton.diagnostics,
    ],
    ids=lambda module: module.__name__,
)
def test_every_public_name_is_on_a_page(module: ModuleType) -> None:
    shown = [(name.rpartition(".")[2], resolve(name)) for name in directives()]
    index = (ROOT / "docs/api/index.md").read_text()
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        is_shown = any(name == last and value is known for last, known in shown)
        # a package has pages of its own
        is_linked = isinstance(value, ModuleType) and f"| `{name}` |" in index
        if not (is_shown or is_linked):
            missing.append(name)
    assert not missing, f"on no page of docs/api: {', '.join(missing)} of {module.__name__}"


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    if missing := [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: `make docs` installs the documentation's tools and builds it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    built = (tmp_path / "site/api/nn/index.html").read_text()
    # the docstring of an argument is there, and no section was left as plain text
    assert "features of a head" in built
    assert "Args:" not in re.sub(r"<pre.*?</pre>", "", built, flags=re.DOTALL)


# --- programs and commands -------------------------------------------------------------------------------------------


def run(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    for program in blocks(page, "python"):
        smaller = program.replace("num_nodes=20_000, num_edges=400_000", "num_nodes=2_000, num_edges=20_000")
        exec(compile(smaller.replace("range(10)", "range(2)"), str(page), "exec"), names)
    return names


@pytest.fixture
def started() -> dict[str, Any]:
    """What a reader has who went through the first page."""
    return run(GUIDE / "getting-started.md", {"__name__": "docs"})


# one of them has a model of torch_geometric
WITH_PROGRAMS = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.interop] if page.stem == "autoscale" else [])
    for page in sorted(GUIDE.glob("*.md"))
    if blocks(page, "python")
]


@pytest.mark.filterwarnings("ignore:there is no CUDA device")
@pytest.mark.parametrize("page", WITH_PROGRAMS)
def test_the_programs_of_the_guide_run(
    page: Path, started: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if page.stem == "autoscale":
        request.getfixturevalue("torch_geometric")
    monkeypatch.chdir(tmp_path)
    names = started if page.stem == "getting-started" else run(page, started)
    assert names["logits"].shape == (names["data"].num_nodes, names["data"].num_classes)
    if page.stem == "features":
        # what was computed once is what every layer computes
        assert (names["out"] - names["model"](names["x"], names["exact"])).abs().max() < 1e-4
    if page.stem == "memory":
        assert names["found"].fits
        assert names["peak"].nbytes > 0


@pytest.mark.parametrize("page", [*READ, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_exist(page: Path) -> None:
    for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["gas-triton"]:
            # ends the program where an argument is unknown
            _parser().parse_args(words[1:])


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*READ, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor and not anchor.startswith("gas_triton."):
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"
