"""The peak of memory beside a stage's seconds: measured, kept, merged, shown; and an older study, which has none."""

from __future__ import annotations

import importlib.util
import mmap
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from convergent.report.page import write_report
from convergent.store import DATABASE, looked_at, opened
from convergent.study import peak
from convergent.study.peak import MIB, Peak, Watch, highest
from convergent.study.profile import Profile
from convergent.study.run import Run
from convergent.study.spec import load_study
from report_fixture import build
from small_study import small_study, write_study
from tiny import tiny_model

counted_anew = pytest.mark.skipif(not peak._set_back(), reason="this system cannot set the peak back")
MUCH = 208


def touch(mib: int) -> None:
    """Memory of the system's own: the heap may have so much free already."""
    with mmap.mmap(-1, mib * MIB) as memory:
        page = np.frombuffer(memory, dtype=np.uint8)
        page[:] = 1
        del page


def scripts_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_experiments", Path(__file__).parents[1] / "scripts" / "write_experiments.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_seconds_of_a_stage_inside_another_count_once(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        run = Run(load_study(write_study(tmp_path, small_study(tiny_model()))), store)
        began = time.perf_counter()
        with run.timed("reading"):
            for _ in range(2):
                with run.timed("extract"), run.timed("judge"):
                    time.sleep(0.05)
            with suppress(ValueError), run.timed("failed"):
                time.sleep(0.05)
                raise ValueError
        whole, kept = time.perf_counter() - began, store.seconds()
        assert set(kept) == {"reading", "extract", "judge"} and kept["judge"] >= 0.1
        assert sum(kept.values()) <= whole - 0.05, "each second once, and none of what failed"


@counted_anew
def test_a_stage_that_takes_200_mib_shows_them_and_the_next_one_does_not(tmp_path: Path) -> None:
    """The larger one first: a peak since the start of the process would be that of both. The second piece of a stage does not lower its peak."""
    with opened(tmp_path / "s") as store:
        run = Run(load_study(write_study(tmp_path, small_study(tiny_model()))), store)
        watch = Profile(run)
        for stage, mib in (("large", MUCH), ("small", 1), ("large", 1)):
            with run.timed(stage):
                touch(mib)
        kept = {s: Peak(*p) for s, p in store.memory().items()}
        assert kept == run.peaks and set(kept) == set(store.seconds())
        assert kept["large"].resident >= kept["small"].resident + 200 and not kept["large"].so_far
        table = list(watch.lines())
        assert table[0].endswith("; peaks of memory are of the whole process while the stage worked")
        assert {line.split()[0]: line.partition("  peak ")[2] for line in table[1:]} == {**{s: str(p) for s, p in kept.items()}, "rest": ""}
        with pytest.raises(ValueError, match="no"), run.timed("failed"):
            raise ValueError("no")
        assert "failed" not in store.memory() and not Watch._running
    page = scripts_page().times(tmp_path / "s", "small")
    assert f"s (peak memory of the process {kept['small']}); the whole study" in page and page.endswith(f" (peak {kept['large']}, while at large).")


@counted_anew
def test_a_stage_inside_another_does_not_hide_what_the_other_took() -> None:
    with Watch() as before:
        touch(1)
    with Watch() as outer:
        touch(MUCH)
        with Watch() as inner:
            touch(1)
    assert min(outer.peak.resident - inner.peak.resident, outer.peak.resident - before.peak.resident) >= 200
    with Watch() as outer:
        with Watch() as inner:
            touch(MUCH)
        with Watch() as later:
            touch(1)
    assert outer.peak.resident >= inner.peak.resident >= later.peak.resident + 200


@pytest.mark.parametrize("why", ["no such file", "no permission"])
def test_a_peak_that_cannot_be_set_back_is_the_processs_and_says_so(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no such file":  # macOS
        monkeypatch.setattr(peak, "_high_water", lambda: None)
    else:

        def refuse(*args: object, **kwargs: object) -> int:
            raise PermissionError(why)

        monkeypatch.setattr(Path, "write_text", refuse)
    with Watch() as watch:
        touch(1)
    assert watch.peak.so_far and watch.peak.resident > 50 and str(watch.peak).endswith(" MiB so far")


def test_allocations_on_a_gpu_stand_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [900 * MIB, 100 * MIB]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(used))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: used[gpu])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: used.__setitem__(gpu, 10 * MIB))
    with Watch() as outer:
        used[1] = 300 * MIB
        with Watch() as inner:
            used[0] = 200 * MIB
    assert (outer.peak.device, inner.peak.device) == (300, 200) and str(inner.peak).endswith(" MiB, 200 MiB on the GPU")


def test_of_several_stages_the_highest_counts() -> None:
    exact, bound, gpu = Peak(500, 0), Peak(800, 0, True), Peak(400, 90)
    assert highest([exact, bound, gpu]) == Peak(800, 90, True) and highest([exact, gpu]) == Peak(500, 90)
    assert Peak(800) | bound == bound | Peak(800) == Peak(800), "a bound that is reached is no bound"
    assert str(highest([])) == "" and str(Peak(1234.4, 90, True)) == "1,234 MiB so far, 90 MiB on the GPU"


def test_the_store_keeps_the_highest_too_and_merges_by_it(tmp_path: Path) -> None:
    a, b = ([(500, 0, False), (400, 90, True)], [(800, 0, True), (500, 10, True), (800, 0, False)])
    for name, pieces in (("a", a), ("b", b)):
        with opened(tmp_path / name) as store:
            for piece in pieces:
                store.add_memory("sample", *piece)
            assert Peak(*store.memory()["sample"]) == highest(Peak(*p) for p in pieces)
    with opened(tmp_path / "a") as store:
        for _ in range(2):
            store.absorb(tmp_path / "b")
            assert store.memory() == {"sample": (800.0, 90.0, False)}


def test_a_store_from_before_has_none_and_gets_them_from_now_on(tmp_path: Path) -> None:
    for name in ("old", "other"):
        with opened(tmp_path / name) as store:
            store.add_seconds("steer", 3.0)
        with sqlite3.connect(tmp_path / name / DATABASE) as db:
            db.execute("DROP TABLE memory")
    with looked_at(tmp_path / "old") as store:
        assert store.memory() == {} and store.seconds() == {"steer": 3.0}
    assert scripts_page().times(tmp_path / "old", "steer") == "Its readings took 3 s; the whole study 0 min, of which sampling 0 and margins 0."
    with opened(tmp_path / "old") as store:
        store.add_memory("steer", 500.0, 0.0, False)
        assert store.absorb(tmp_path / "other") == 0
        assert store.memory() == {"steer": (500.0, 0.0, False)} and store.seconds() == {"steer": 6.0}


def test_the_report_says_it_where_it_says_the_time(tmp_path: Path) -> None:
    results = build(hostile=False)
    assert "Took 25 min on 2 cores" in write_report(results, tmp_path / "old").read_text(encoding="utf-8")
    results.study["memory"] = str(Peak(812))  # type: ignore[index]
    page = write_report(results, tmp_path / "new").read_text(encoding="utf-8")
    assert "Took 25 min (peak memory of the process 812 MiB) on 2 cores" in page
