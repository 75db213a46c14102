"""kill -9 at random moments: the same figures and the same rows as an undisturbed run, none lost, none twice."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from small_study import N_MARGINS, N_RESPONSES

TABLES = ("responses", "judgements", "margins", "facts")


def rows(folder: Path, table: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "study.sqlite") as db:
        where = " WHERE stage != 'run'" if table == "facts" else ""  # when it was made
        return sorted(db.execute(f"SELECT * FROM {table}{where}"), key=repr)


def figures(folder: Path) -> dict[str, pd.DataFrame]:
    """Every table but for the seconds that training took."""
    return {p.name: pd.read_csv(p, dtype=str).drop(columns="seconds", errors="ignore") for p in sorted((folder / "tables").glob("*.csv"))}


def killed(root: Path, n: int, name: str) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CONVERGENT_CACHE": str(root / "cache")}
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, str(script), str(root), str(n), name], capture_output=True, text=True, env=env, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize(("n", "name"), [(4, "default"), pytest.param(10, "ten", marks=pytest.mark.slow)])
def test_same_figures_after_kills(tmp_path: Path, n: int, name: str) -> None:
    report = killed(tmp_path, n, name)
    logs = {p.name: p.read_text()[-2000:] for p in tmp_path.glob("*.log")}
    assert report["undisturbed"] == 0 and set(report["codes"]) == {0} and len(report["kills"]) == n, (report, logs)
    want, tables = {t: rows(tmp_path / "undisturbed", t) for t in TABLES}, figures(tmp_path / "undisturbed")
    assert len(want["responses"]) == N_RESPONSES and len(want["judgements"]) == 2 * N_RESPONSES and len(want["margins"]) == N_MARGINS
    for folder in report["folders"]:
        for table in TABLES:
            assert rows(tmp_path / folder, table) == want[table], (folder, table)
        found = figures(tmp_path / folder)
        assert found.keys() == tables.keys() and len(found) == 12
        for csv, frame in tables.items():
            pd.testing.assert_frame_equal(found[csv], frame, check_exact=True, obj=f"{folder}/{csv}")
        with sqlite3.connect(tmp_path / folder / "study.sqlite") as db:
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    print(report)
