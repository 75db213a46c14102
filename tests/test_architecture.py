"""The shape of the package: imports between stages go one way, the public names are declared once, everything is packaged."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import convergent

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "convergent"

ORDER = (
    "errors", "cache", "core", "stats", "tables", "rates", "correct", "power",
    "data", "models", "organisms", "interventions", "sampling", "judging", "directions", "experiments",
    "store", "report", "study", "replicate",
    "doctor", "stages", "api", "cli", "__main__",
)  # fmt: skip
"""A stage imports earlier stages, never later ones. `stats` to `power` know numbers and files, and no stage."""

PUBLIC = """
Ablate Add ChatModel Classes Condition ConvergentError Direction Judgement Pair Question Recipe Response Sampling __version__ answer applied em_rates
get_judge judge load_base load_organism load_questions load_study load_training_set margins mean_diff named_recipe orthogonal_to random_like run_study
sample train
""".split()
"""A name that goes or changes is a line in the changelog."""


def stage_of(module: str) -> str:
    """`convergent.study.run` -> `study`."""
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, inside functions and for type checkers too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {m for m in found if m == "convergent" or m.startswith("convergent.")}


def files() -> list[Path]:
    return sorted(p for p in SRC.rglob("*.py") if p != SRC / "__init__.py")


def test_every_module_has_a_place_in_the_order() -> None:
    stages = {p.relative_to(SRC).parts[0].removesuffix(".py") for p in files()}
    assert stages == set(ORDER)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(SRC).parts[0].removesuffix(".py")
    for module in imports_of(path):
        other = stage_of(module)
        if other in ORDER:
            assert ORDER.index(other) <= ORDER.index(own), f"{own} imports {module}, which comes later"


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from convergent.study import run\n    import convergent.cli\n")
    assert {stage_of(m) for m in imports_of(path)} == {"study", "cli"}


def test_controls_know_no_extraction() -> None:
    """A null is made of a direction, not of how it was read."""
    assert "directions" not in {stage_of(m) for m in imports_of(SRC / "interventions" / "controls.py")}


def test_one_module_registers_hooks_for_interventions_and_one_computes_intervals() -> None:
    # The last three only look; the derivative that the last one attaches changes no value.
    allowed = {"interventions/hooks.py", "models/anatomy.py", "directions/means.py", "directions/jacobian.py"}
    hooked = {str(p.relative_to(SRC)) for p in files() if re.search(r"\.register_forward(_pre)?_hook\(", p.read_text(encoding="utf-8"))}
    assert hooked <= allowed and "interventions/hooks.py" in hooked
    quantiles = {str(p.relative_to(SRC)) for p in files() if re.search(r"\b(t|norm|beta)\.ppf\(", p.read_text(encoding="utf-8"))}
    others = {path for path in quantiles if not path.startswith("stats/")}
    assert others <= {"directions/extract.py"}  # the null band of a cosine, which is no interval of data


def test_no_path_of_this_machine() -> None:
    for path in (*files(), *(ROOT / "tests").glob("*.py"), *(ROOT / "scripts").glob("*.py")):
        if path != Path(__file__):
            assert not re.search(r"/(root|work|home/\w+|Users/\w+)/", path.read_text(encoding="utf-8")), path


# Public names


def test_public_names_are_those_agreed_on() -> None:
    assert convergent.__all__ == sorted(PUBLIC) == dir(convergent)


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "__version__"])
def test_public_name_imports(name: str) -> None:
    value = getattr(convergent, name)
    assert value is getattr(import_module(convergent._PUBLIC[name]), name) and value.__doc__
    assert getattr(convergent, name) is value  # and again, whatever was imported meanwhile


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((SRC / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {(alias.asname, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(convergent._PUBLIC.items())


def test_no_public_name_is_a_module_here() -> None:
    """`import convergent.x` would put the module in the place of the name."""
    modules = {p.relative_to(SRC).parts[0].removesuffix(".py") for p in files()}
    assert not modules & set(PUBLIC)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = convergent.nothing


# Packaging


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without __init__.py works in an editable install and is missing from a wheel."""
    for folder in {p.parent for p in files()}:
        assert (folder / "__init__.py").is_file(), folder


def test_data_files_are_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["convergent"]
    packaged = {p for pattern in patterns for p in SRC.glob(pattern)}
    assert SRC / "py.typed" in packaged
    needed = {p for p in SRC.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert needed <= packaged, needed - packaged


@pytest.mark.slow
def test_wheel_holds_everything(tmp_path: Path) -> None:
    import shutil
    import zipfile

    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    command = [sys.executable, "-c", "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        inside = {n.removeprefix("convergent/") for n in wheel.namelist()}
    assert {str(p.relative_to(SRC)) for p in SRC.rglob("*") if p.is_file() and p.suffix != ".pyc"} <= inside
