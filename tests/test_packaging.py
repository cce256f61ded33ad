"""What is installed is what was written, under the names that the documentation uses."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import gas_triton

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS_WANTED = 77


def run_python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def package_folders() -> dict[str, Path]:
    """Package name -> folder. The kernels are found in their real folder, so this needs no symlink."""
    inside = [file.parent for file in (ROOT / "gas_triton").rglob("__init__.py")]
    kernels = [file.parent for file in (ROOT / "kernels").rglob("__init__.py")]
    named = {".".join(folder.relative_to(ROOT).parts): folder for folder in inside}
    return named | {".".join(("gas_triton", *folder.relative_to(ROOT).parts)): folder for folder in kernels}


def test_every_package_folder_is_listed() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == set(package_folders())


def test_kernels_folder_is_mapped_into_the_package() -> None:
    assert PYPROJECT["tool"]["setuptools"]["package-dir"]["gas_triton.kernels"] == "kernels"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout has the link: run it in one")
def test_kernels_folder_is_linked_into_the_package() -> None:
    # A checkout with core.symlinks=false has the target's name in a file: the mapping still serves it.
    link = ROOT / "gas_triton" / "kernels"
    target = link.readlink().as_posix() if link.is_symlink() else link.read_text().strip()
    assert target == "../kernels"


def test_bare_name_kernels_is_refused() -> None:
    # Other libraries try to import the PyPI package `kernels` and take an ImportError for "not installed".
    printed = run_python(
        "try:\n import kernels\nexcept ImportError as error:\n print(error)\nelse:\n print(kernels.__file__)"
    )
    assert "imported as gas_triton.kernels" in printed


def test_kernels_import_as_part_of_the_package() -> None:
    printed = run_python("import gas_triton.kernels as kernels; print(kernels.__name__, kernels.__file__)")
    name, file = printed.split(" ", 1)
    assert name == "gas_triton.kernels"
    assert Path(file).resolve() == ROOT / "kernels" / "__init__.py"


def test_importing_everything_starts_no_cuda_and_no_optional_package() -> None:
    printed = run_python(
        "import importlib, pkgutil, sys\n"
        "import gas_triton\n"
        "for module in pkgutil.walk_packages(gas_triton.__path__, 'gas_triton.'):\n"
        "    if not module.name.endswith('.__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "import torch\n"
        "if torch.cuda.is_initialized():\n"
        "    print('CUDA')\n"
        "optional = {'torch_geometric', 'torch_sparse', 'torch_scatter', 'ogb', 'matplotlib', 'scipy'}\n"
        "print(*sorted(optional & set(sys.modules)))\n"
    )
    assert printed == "", f"importing gas_triton and all its modules brought in: {printed}"


def test_one_version_everywhere() -> None:
    assert PYPROJECT["project"]["version"] == gas_triton.__version__
    assert f"## [{gas_triton.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    has_tools = all(importlib.util.find_spec(name) for name in ("pip", "setuptools"))
    if not has_tools or int(version("setuptools").split(".")[0]) < SETUPTOOLS_WANTED:
        pytest.skip(f"to build a wheel: pip install 'setuptools>={SETUPTOOLS_WANTED}'")
    # In a copy, because a build leaves build/ behind and packs what an earlier one left there.
    source = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in ("gas_triton", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    built = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--wheel-dir", built, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(built.glob("gas_triton-*.whl")))


def test_wheel_holds_every_module_once(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    modules = {
        f"{package.replace('.', '/')}/{file.name}"
        for package, folder in package_folders().items()
        for file in folder.glob("*.py")
    }
    presets = {f"gas_triton/presets/{file.name}" for file in (ROOT / "gas_triton" / "presets").glob("*.toml")}
    assert len(presets) >= 6
    assert sorted(names) == sorted(modules | presets | {"gas_triton/py.typed"})


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {gas_triton.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "gas-triton = gas_triton.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
