"""What the benchmarks share: ratios point the right way, failures are named, and the page hides nothing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str((ROOT / path).parent))  # as for a script: benchmarks import each other by name
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


common, page = loaded("benchmarks/common.py"), loaded("scripts/write_benchmarks.py")


def test_sides_alternate_and_ratios_are_taken_within_a_repeat() -> None:
    order: list[str] = []
    figures = {"convergent": iter([10.0, 30.0]), "peer": iter([5.0, 10.0])}

    def side(name: str) -> float:
        order.append(name)
        return next(figures[name])

    sides = common.Sides({name: lambda n=name: side(n) for name in figures}).measure(2)
    assert order == ["convergent", "peer", "peer", "convergent"]
    assert sides.ratios("convergent", "peer") == [2.0, 3.0]
    assert sides.ratios("convergent", "peer", more_is_better=False) == [0.5, 1 / 3]  # seconds: we took twice as long
    assert sides.best(["convergent", "peer"]) == "convergent" and sides.best(["convergent", "peer"], more_is_better=False) == "peer"


def test_a_peer_that_fails_is_named_and_our_own_failure_ends_the_run() -> None:
    def broken() -> float:
        raise ValueError("no\nkernel")

    sides = common.Sides({"convergent": lambda: 1.0, "peer": broken}).measure(3)
    assert sides.failed == {"peer": "ValueError: no kernel"} and sides.ratios("convergent", "peer") == [] and len(sides.figures["convergent"]) == 3
    with pytest.raises(ValueError, match="kernel"):
        common.Sides({"convergent": broken}).measure(1)


def record(ratios: list[float], **more: object) -> str:
    rows = {"decode_equal": common.row(ratios, 2.2, "generate")}
    return json.dumps({"claim": "decode_equal", "rows": rows, "failed": {"static cache": "ValueError: no"}, "date": "2026-01-01", "machine": common.machine(1), **more})


def test_the_page_shows_what_is_bad_absent_and_failed(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join([record([2.5]), record([1.0, 1.5, 1.4]), record([9.0], quick=True)]) + "\n")
    text = page.page(page.read(file))
    line = next(line for line in text.splitlines() if line.startswith("| decode, 64 rows"))
    assert "1.4x | 1x to 1.5x | 3 | **no**" in line and "provisional" not in line  # the newest full run, not the better quick one
    assert "static cache failed: ValueError: no" in text
    assert next(line for line in text.splitlines() if line.startswith("| one reader")).count("not measured") == 1
    assert page.page(page.read(tmp_path / "absent.jsonl")).count("not measured") >= len(page.CLAIMS)


def test_a_broken_line_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"ratios": []}\n')
    with pytest.raises(SystemExit, match="line 1: is no benchmark record"):
        page.read(file)


def test_memory_is_theirs_over_ours_above_the_loaded_model_and_whole() -> None:
    extraction = loaded("benchmarks/extraction.py")

    def side(above: list[float], peak: list[float]) -> dict[str, list[float]]:
        own = {"above_load_mib": [50.0, 40.0], "peak_mib": [1000.0, 500.0]}
        return {"above_load_mib": above, "peak_mib": peak, "memory_above_load": [a / b for a, b in zip(above, own["above_load_mib"])], "memory": [a / b for a, b in zip(peak, own["peak_mib"])]}

    peers = {"frugal": side([100.0, 120.0], [3000.0, 3000.0]), "small": side([500.0, 500.0], [1100.0, 600.0])}
    rows = extraction.memory_rows(peers, side([50.0, 40.0], [1000.0, 500.0]))
    assert rows["extraction_memory"]["ratios"] == [2.0, 3.0] and rows["extraction_memory"]["peer"] == "frugal" and rows["extraction_memory"]["target"] == 2.0
    assert rows["extraction_peak"]["ratios"] == [1.1, 1.2] and rows["extraction_peak"]["peer"] == "small" and rows["extraction_peak"]["target"] is None
    assert extraction.memory_rows({}, side([1.0], [1.0])) == {}
    text = page.page({"extraction": {"claim": "extraction", "rows": rows}})
    assert "| the whole process's peak memory of the same, theirs over ours | best of them: small |  | 1.15x | 1.1x to 1.2x | 2 | - |" in text


def test_peak_memory_is_read_from_the_process() -> None:
    extraction = loaded("benchmarks/extraction.py")
    now, most = extraction.memory_mib("VmRSS"), extraction.memory_mib("VmHWM")
    assert 0 < now <= most * 1.01
    assert extraction.memory_mib("no such field") > 0  # the process's peak instead


def test_a_target_with_two_ends_is_missed_on_either_side_and_old_lines_are_read() -> None:
    def verdict(row: dict[str, object]) -> str:
        text = page.page({"growth_answers": {"claim": "growth_answers", "rows": {"growth_answers_256": row}}})
        return next(line for line in text.splitlines() if line.startswith("| growth answers 256"))

    for ratio, met in ((0.85, "**no**"), (0.9, "yes"), (1.05, "yes"), (1.1, "yes"), (1.2, "**no**")):
        line = verdict(common.row([ratio], 0.9, "64 answers", most=1.1))
        assert f"| 1 | {met} |" in line and "0.9 to 1.1x" in line
    old = {k: v for k, v in common.row([1.2], 0.9, "64 answers").items() if k != "most"}
    assert "| 1 | yes |" in verdict(old) and "| 0.9x |" in verdict(old)
    assert "| 1 | yes |" in verdict(common.row([1.2], 2.0, "", unit="s", at_most=True))


def test_missed_targets_are_set_beside_the_line() -> None:
    rows = {
        "decode_equal": common.row([1.6, 1.8], 2.2, "generate"),
        "decode_equal_ceiling": common.row([2.3, 2.5], None, "generate"),
        "sweep_best": common.row([2.0], 4.0, "the fastest library: x"),
        "sweep_authors": common.row([6.5], 6.0, "authors"),
        "sweep_line": common.row([0.8], None, "the line"),
        "extraction_authors": common.row([2.0], 3.0, "authors"),  # its line was not measured
    }
    part = page.page({"all": {"claim": "all", "rows": rows}}).partition("## Missed targets and the line")[2].partition("## Growth")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ") and "at the line" not in line]
    assert [line.split(" | ")[2:] for line in lines] == [["2.2x", "1.7x", "2.4x", "below it: not reached yet |"], ["4x", "2x", "2.5x", "above the line |"]]


def test_an_answers_cost_is_without_the_reading_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = loaded("benchmarks/growth.py")
    asked: list[tuple[int, int]] = []

    def ours(model: object, questions: list[object], n: int, tokens: int, rows: int) -> tuple[float, int, int]:
        assert len(questions) == 1 and len(questions[0].paraphrases) == 1  # type: ignore[attr-defined]
        asked.append((n, tokens))
        return 10.0 + n * tokens, n, n * tokens  # 10 s for the prompt, a second for each token

    monkeypatch.setattr(growth, "ours", ours)
    assert growth.per_answer(None, 64, 24, 128) == pytest.approx(24, rel=0.01) and asked == [(1, 1), (64, 24)] * 2
    assert growth.per_answer(None, 4096, 24, 128) == pytest.approx(24, rel=0.01) and len(asked) == 6
    assert growth.behind(None, 1024, 32) == 1.0


def test_decode_alone_is_what_a_run_takes_beyond_one_new_token() -> None:
    decoding = loaded("benchmarks/decoding.py")
    assert decoding.per_token((3.0, 64), (7.0, 320)) == 4 / 256
    text = page.page({"decode_equal": {"claim": "decode_equal", "rows": {"decode_equal_without_prompts": common.row([1.5], None, "generate")}}})
    assert "| decode equal without prompts | generate |  | 1.5x |" in text[text.index("## Beside the table") :]


def test_parts_of_growth_that_are_stored_one_by_one_stand_together(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    lines = [{"claim": f"growth_{part}", "rows": {f"growth_{part}_64": common.row([1.0], 0.9, "one")}} for part in ("answers", "conditions")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page.page(page.read(file))
    assert "| growth answers 64 |" in text and "| growth conditions 64 |" in text


def test_every_benchmark_is_told_to_be_quick() -> None:
    run = loaded("benchmarks/run.py")
    options = argparse.Namespace(quick=True, repeats=1, threads=1, study=None)
    for name in run.benchmarks():
        command = run.command_of(name, options)
        assert command[2:] == ["--quick", "--repeats", "1", "--threads", "1"], name
    assert run.command_of("training", argparse.Namespace(quick=False, repeats=None, threads=None, study=None), ["--steps", "6"])[2:] == ["--steps", "6"]


def test_options_of_one_benchmark_need_that_one_named() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/run.py"), "training", "judge", "--", "--steps", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and "name that one alone" in done.stderr


def test_a_recipe_stored_alone_leaves_the_others_row(tmp_path: Path) -> None:
    def line(recipe: str, ratio: float, **more: object) -> str:
        return json.dumps({"claim": f"training_{recipe}", "recipe": recipe, "ratios": {"TRL": [ratio], "PEFT loop": [9.0]}, "failed": {}, **more}) + "\n"

    file = tmp_path / "results.jsonl"
    file.write_text(line("nine_adapter", 2.0) + line("all_adapter", 1.9) + line("nine_adapter", 2.6, settings={"steps": 6}) + line("all_adapter", 5.0, quick=True))
    text = page.page(page.read(file))
    assert "TRL | ≥ 1.8x | 1.9x |" in text and "TRL | ≥ 2.5x | 2.6x |" in text and "Work: steps 6." in text
