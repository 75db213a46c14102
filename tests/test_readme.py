"""What the README promises runs: its Python example on the embedded model, its commands, its tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.S)


def test_the_example_is_short():
    assert EXAMPLE is not None
    assert len(EXAMPLE.group(1).strip().splitlines()) <= 20


@pytest.mark.slow
def test_the_example_runs_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    assert EXAMPLE is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLE.group(1), "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert re.search(r"organism: mean alignment \d+\.\d, n = 48", out)
    assert re.search(r"ablated: mean alignment \d+\.\d, n = 1\d", out)
    assert (tmp_path / "runs/a/direction.safetensors").is_file()


def test_every_command_is_documented():
    from typer.main import get_command

    from convergent.cli import app

    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`convergent {name}" in README, name


def test_the_tree_names_every_folder_and_module():
    tree = README.partition("## The tree")[2]
    package = ROOT / "src" / "convergent"
    for path in sorted(package.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            assert f"  {path.name}/" in tree, path.name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
