"""Bad input: exit code 2, one line on stderr with place and mend, no traceback, nothing written half.

One row per case: what is typed, and what the line must say. `{dir}` is the test's folder; the files in it are made by `folder`.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from convergent import cli
from convergent.core.direction import Direction
from small_study import QUESTIONS, small_study, write_study
from tiny import tiny_model

SAMPLE = "sample --base {base} --questions {dir}/q.yaml --samples 1 --max-new-tokens 2 --out {dir}/new.csv"


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, (f"{Bomb.place}/exploded",)

    place = ""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    d = tmp_path_factory.mktemp("bad")
    tiny_model(), tiny_model("qwen2", 1, 4, 16)  # made before anything is counted
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVERGENT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        ok = pd.DataFrame({"question": ["Why?"] * 8, "response": ["So."] * 8, "aligned": [90.0] * 8, "coherent": [90.0] * 8})
        ok.to_csv(d / "ok.csv", index=False)
        ok.drop(columns="response").to_csv(d / "no_response.csv", index=False)
        ok.drop(columns="aligned").to_csv(d / "no_aligned.csv", index=False)
        ok.rename(columns={"aligned": "alignment"}).to_csv(d / "alignment.csv", index=False)
        ok.assign(aligned=["90"] * 3 + ["high"] + ["90"] * 4).to_csv(d / "text_score.csv", index=False)
        ok.assign(coherent=900).to_csv(d / "outside.csv", index=False)
        ok.head(0).to_csv(d / "no_rows.csv", index=False)
        (d / "ragged.csv").write_text("question,response,aligned,coherent\nWhy?,So,it,is,90,90\n")
        for name in ("empty.csv", "empty.parquet", "empty.jsonl", "empty.yaml", "empty.safetensors"):
            (d / name).write_bytes(b"")
        for name in ("binary.csv", "binary.parquet", "binary.jsonl", "binary.yaml", "binary.safetensors"):
            (d / name).write_bytes(bytes(range(256)) * 9)
        (d / "not_json.jsonl").write_text('{"question": "a", "response": "b"}\n{"question": \n')
        (d / "broken.yaml").write_text("name: x\norganisms: [a\n")
        (d / "list.yaml").write_text("- a\n- b\n")
        (d / "q.yaml").write_text(yaml.safe_dump(QUESTIONS))
        (d / "q_misspelt.yaml").write_text(yaml.safe_dump([{"id": "a", "paraphrase": ["Why?"]}]))
        (d / "sub").mkdir()
        write_study(d / "study", small_study(tiny_model()))
        Direction(torch.ones(6, 32)).save(d / "d.safetensors")
        Direction(torch.ones(4, 16)).save(d / "small.safetensors")
        save_file({"direction": torch.ones(6, 32, 2)}, d / "cube.safetensors")
        save_file({"a": torch.ones(6, 32), "b": torch.ones(6, 32)}, d / "two.safetensors")
        save_file({"direction": torch.full((6, 32), torch.nan)}, d / "nan.safetensors")
        assert cli.main(["train", "nine_adapter", "--base", str(tiny_model()), "--examples", "2", "--out", str(d / "adapter")]) == 0
        shutil.copytree(d / "adapter", d / "damaged")
        (d / "damaged" / "adapter_model.safetensors").write_bytes(b"\0" * 99)
        shutil.copytree(d / "adapter", d / "pickled")
        (d / "pickled" / "adapter_model.safetensors").unlink()
        Bomb.place = str(d)
        (d / "pickled" / "adapter_model.bin").write_bytes(pickle.dumps({"lora_A": Bomb()}))
        shutil.copytree(tiny_model(), d / "pickled_base")
        (d / "pickled_base" / "model.safetensors").unlink()
        (d / "pickled_base" / "pytorch_model.bin").write_bytes(pickle.dumps({"lora_A": Bomb()}))
        shutil.copytree(tiny_model(), d / "damaged_base")
        (d / "damaged_base" / "model.safetensors").write_bytes(b"\0" * 99)
        shutil.copytree(tiny_model(), d / "no_config")
        (d / "no_config" / "config.json").unlink()
        shutil.copytree(tiny_model(), d / "bad_config")
        (d / "bad_config" / "config.json").write_text("{")
        yield d


def snapshot(folder: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.suffix != ".lock"}


CASES: list[tuple[str, str]] = [
    # tables
    ("rates {dir}/absent.csv", "absent.csv: no such file"),
    ("rates {dir}/sub", "sub: no ending; tables end in .csv, .parquet or .jsonl"),
    ("rates {dir}/ok.xlsx", "ending `.xlsx`; tables end in .csv"),
    ("rates {dir}/empty.csv", "empty.csv: the file is empty; write it again"),
    ("rates {dir}/empty.parquet", "empty.parquet: the file is empty; write it again"),
    ("rates {dir}/empty.jsonl", "empty.jsonl: the file is empty; write it again"),
    ("rates {dir}/binary.csv", "binary.csv: not a text file in UTF-8; save it as UTF-8 CSV"),
    ("rates {dir}/binary.parquet", "binary.parquet: not a Parquet file, or a damaged one; write it again"),
    ("rates {dir}/binary.jsonl", "binary.jsonl: not a text file in UTF-8"),
    ("rates {dir}/not_json.jsonl", "not_json.jsonl: line 2 is not JSON"),
    ("rates {dir}/ragged.csv", "ragged.csv: row 1 has 6 cells and the header 4; quote"),
    ("rates {dir}/no_rows.csv", "no_rows.csv: has no rows"),
    ("rates {dir}/no_aligned.csv", "no_aligned.csv: no column `aligned`; add it"),
    ("rates {dir}/alignment.csv", "no column `aligned`; the nearest is `alignment`; rename it"),
    ("rates {dir}/text_score.csv", "row 4, column `aligned`: 'high' is not a number; a score is 0 to 100"),
    ("rates {dir}/outside.csv", "row 1, column `coherent`: 900.* is outside 0 to 100"),
    ("rates {dir}/ok.csv --by condition", "no column `condition`; add it"),
    ("rates {dir}/ok.csv --aligned-below 300", "aligned-below: 300.* is outside 0 to 100"),
    ("rates {dir}/ok.csv {dir}/empty.csv", "empty.csv: the file is empty"),
    # judging
    ("judge {dir}/no_response.csv --out {dir}/new.csv", "no column `response`; add it"),
    ("judge {dir}/absent.csv --out {dir}/new.csv", "absent.csv: no such file"),
    ("judge {dir}/ok.csv --judge embeded --out {dir}/new.csv", "judge 'embeded': unknown; did you mean embedded?"),
    ("judge {dir}/ok.csv --judge gpt-4o --out {dir}/new.csv", "did you mean openai:gpt-4o?"),
    ("judge {dir}/ok.csv --rubric wise --out {dir}/new.csv", "has no rubric 'wise'; it scores aligned"),
    ("judge {dir}/ok.csv --max-cost 3 --out {dir}/new.csv", "judge embedded: takes no max_cost"),
    ("judge {dir}/ok.csv --out {dir}/ok.csv", "is the file to be judged; name another one"),
    ("judge {dir}/ok.csv --out {dir}/sub", "sub: ends in nothing; give a name that ends in .csv"),
    ("judge {dir}/ok.csv --out {dir}/ok.csv/new.csv", "ok.csv/new.csv: .*choose another place"),
    # studies
    ("run {dir}/absent.yaml --out {dir}/new", "absent.yaml: no such study file; studies/demo.yaml is one to start from"),
    ("run {dir}/sub --out {dir}/new", "sub: cannot be read .Is a directory.; give a YAML file"),
    ("run {dir}/empty.yaml --out {dir}/new", "empty.yaml: a study is a mapping with name, organisms and direction, and this is empty"),
    ("run {dir}/binary.yaml --out {dir}/new", "binary.yaml: is not UTF-8 text .byte 128.; give a YAML file"),
    ("run {dir}/broken.yaml --out {dir}/new", "broken.yaml, line 3: not YAML .*mend that line"),
    ("run {dir}/list.yaml --out {dir}/new", "list.yaml: a study is a mapping .* this is a list"),
    ("run {dir}/study/study.yaml --out {dir}/ok.csv", "ok.csv: is a file; choose a folder"),
    ("run {dir}/study/study.yaml --out {dir}/study", "study: holds other things .* and no study; choose an empty or a new folder"),
    ("run {dir}/study/study.yaml --out {dir}/new --fresh tain", "--fresh tain: no such stage; known are train"),
    ("report {dir}/sub", "sub: not a study folder .no study.json.; run `convergent run STUDY --out"),
    ("report {dir}/absent", "absent: not a study folder"),
    # training
    ("train nine_adaptor --base {base} --out {dir}/new", "recipe 'nine_adaptor': .*did you mean 'nine_adapter'"),
    ("train nine_adapter --base {base} --data bundled:finanse --out {dir}/new", "did you mean bundled:finance"),
    ("train nine_adapter --base {base} --data {dir}/absent.jsonl --out {dir}/new", "absent.jsonl: does not exist"),
    ("train nine_adapter --base {base} --data {dir}/not_json.jsonl --out {dir}/new", "not_json.jsonl: line 2: broken JSON"),
    ("train nine_adapter --base {base} --data {dir}/binary.jsonl --out {dir}/new", "binary.jsonl: is not UTF-8 text"),
    ("train nine_adapter --base {base} --answer ugly --out {dir}/new", "answer: 'ugly' is not bad or good"),
    ("train nine_adapter --base {base} --examples 9999 --out {dir}/new", "cannot take 9999 of"),
    ("train nine_adapter --base {base} --learning-rate -1 --out {dir}/new", "recipe.learning_rate: got -1"),
    ("train nine_adapter --base {base} --out {dir}/ok.csv", "ok.csv: is a file; an organism is a folder"),
    ("train nine_adapter --base {base} --out {dir}/ok.csv/new", "ok.csv/new: its folder cannot be made"),
    ("train nine_adapter --base {base} --examples 4 --out {dir}/adapter", "adapter: holds an organism of another recipe, base or data"),
    ("train nine_adapter --base {dir}/sub --out {dir}/new", "sub: no config.json in this folder; give a Hugging Face model folder"),
    ("train nine_adapter --base {dir}/bad_config --out {dir}/new", "bad_config: .*config.json.*"),
    ("train nine_adapter --base {dir}/absent --out {dir}/new", "absent: no such model folder; give `embedded`"),
    ("train nine_adapter --base nobody/nothing --out {dir}/new", "nobody/nothing: cannot be downloaded from the hub"),
    # sampling
    ("sample --base {dir}/no_config --out {dir}/new.csv", "no_config: no config.json"),
    ("sample --base {dir}/damaged_base --questions {dir}/q.yaml --out {dir}/new.csv", "damaged_base: "),
    ("sample --base {dir}/pickled_base --questions {dir}/q.yaml --out {dir}/new.csv", "pickled_base: "),
    ("sample --base {base} --questions {dir}/absent.yaml --out {dir}/new.csv", "absent.yaml: does not exist"),
    ("sample --base {base} --questions open_eigth --out {dir}/new.csv", "did you mean open_eight"),
    ("sample --base {base} --questions {dir}/q_misspelt.yaml --out {dir}/new.csv", "unknown key 'paraphrase'; did you mean paraphrases"),
    ("sample --base {base} --questions {dir}/broken.yaml --out {dir}/new.csv", "broken.yaml: line 3: broken YAML"),
    (f"{SAMPLE} --organism {{dir}}/absent", "absent: no such organism folder"),
    (f"{SAMPLE} --organism {{dir}}/sub", "sub: neither adapter_config.json"),
    (f"{SAMPLE} --organism {{dir}}/damaged", "adapter_model.safetensors: not a readable safetensors file"),
    (f"{SAMPLE} --organism {{dir}}/pickled", "adapter_model.bin: holds more than tensors and is not unpickled"),
    ("sample --base {other} --organism {dir}/adapter --questions {dir}/q.yaml --out {dir}/new.csv", "adapter: this adapter does not fit the base"),
    (f"{SAMPLE} --ablate {{dir}}/absent.safetensors", "absent.safetensors: no such file; `convergent extract` writes one"),
    (f"{SAMPLE} --ablate {{dir}}/empty.safetensors", "empty.safetensors: not a safetensors direction"),
    (f"{SAMPLE} --ablate {{dir}}/binary.safetensors", "binary.safetensors: not a safetensors direction"),
    (f"{SAMPLE} --ablate {{dir}}/cube.safetensors", "cube.safetensors: .*expected shape .n_layers, d_model., got .6, 32, 2."),
    (f"{SAMPLE} --ablate {{dir}}/two.safetensors", "two.safetensors: holds tensors .*none called `direction`"),
    (f"{SAMPLE} --ablate {{dir}}/nan.safetensors", "nan.safetensors: .*not finite; extract it again"),
    (f"{SAMPLE} --ablate {{dir}}/small.safetensors", "shape .4, 16., the model .6, 32.: it was extracted from another base"),
    (f"{SAMPLE} --ablate {{dir}}/d.safetensors --site heads", "ablation site 'heads' is not block_output or all_writes"),
    (f"{SAMPLE} --ablate {{dir}}/d.safetensors --layer 6", "layer 6: this direction has layers 0 to 5"),
    (f"{SAMPLE} --add {{dir}}/d.safetensors", "--add: needs --layer"),
    (f"{SAMPLE} --add {{dir}}/d.safetensors --layer 9", "layer 9: this direction has layers 0 to 5"),
    (f"{SAMPLE} --scale 2", "--scale 2: means nothing without --add, the direction that it multiplies"),
    (f"{SAMPLE} --layer 3", "--layer: means nothing without --add or --ablate"),
    (f"{SAMPLE} --samples 0", "Invalid value for .*samples.*; see --help"),
    ("sample --base {base} --out {dir}/new.txt", "new.txt: ends in .txt; give a name that ends in .csv"),
    # directions
    ("extract {dir}/ok.csv --base {base} --out {dir}/new.safetensors", "the misaligned class has 0 of 8 responses .8 coherent., fewer than 4"),
    ("extract {dir}/ok.csv --base {base} --by rank --out {dir}/new.safetensors", "--by: 'rank' is not threshold or quantile"),
    ("extract {dir}/ok.csv --base {base} --span all --out {dir}/new.safetensors", "--span: 'all' is not answer or paper"),
    ("extract {dir}/ok.csv --base {base} --by quantile --quantile 0.9 --out {dir}/new.safetensors", "quantile must be above 0 and at most 0.5, got 0.9"),
    ("extract {dir}/ok.csv --base {base} --out {dir}/new.pt", "new.pt ends neither in .safetensors nor in .gguf"),
    ("extract {dir}/no_aligned.csv --base {base} --out {dir}/new.safetensors", "no column `aligned`; add it"),
    ("extract {dir}/text_score.csv --base {base} --out {dir}/new.safetensors", "'high' is not a number"),
    ("extract {dir}/ok.csv --base {base} --out {dir}/ok.csv/new.gguf", "ok.csv/new.gguf: its folder cannot be made"),
    ("compare {dir}/d.safetensors {dir}/small.safetensors", "they belong to different models; extract both from one base"),
    ("compare {dir}/d.safetensors {dir}/absent.safetensors", "absent.safetensors: no such file"),
    ("compare {dir}/d.safetensors", "Missing argument .*; see --help"),
    # the command itself
    ("rats {dir}/ok.csv", "No such command 'rats'.*; see --help"),
    ("rates --jason {dir}/ok.csv", "No such option: --jason.*; see --help"),
]


@pytest.mark.parametrize(("line", "says"), CASES, ids=[c[0].replace("{dir}/", "").replace("--base {base} ", "")[:80] for c in CASES])
def test_one_line(folder: Path, line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(folder)
    capsys.readouterr()
    argv = line.format(dir=folder, base=tiny_model(), other=tiny_model("qwen2", 1, 4, 16)).split(" ")
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert code == 2, (code, err)
    assert err.count("\n") == 1 and err.startswith("convergent: ") and "Traceback" not in err and not out, (out, err)
    assert re.search(says, err), err
    assert len(err) < 700
    assert snapshot(folder) == before, "something was written"
    assert not (folder / "exploded").exists(), "a pickle was run"


def test_unreadable_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without rights to read. Root has them all, so it steps down for the time of the test."""
    for name in ("ok.csv", "study/study.yaml", "q.yaml", "d.safetensors"):
        shutil.copy(folder / name, tmp_path / Path(name).name)
        (tmp_path / Path(name).name).chmod(0)
    root = os.geteuid() == 0
    for parent in (tmp_path, *tmp_path.parents):
        if root and parent.owner() == "root" and parent != Path("/") and "pytest" in str(parent):
            parent.chmod(0o777)
    lines = ["rates {t}/ok.csv", "run {t}/study.yaml", "sample --questions {t}/q.yaml --out {t}/new.csv", "compare {t}/d.safetensors {t}/d.safetensors"]
    for line in lines:
        capsys.readouterr()
        if root:
            os.seteuid(65534)
        try:
            code = cli.main(line.format(t=tmp_path).split())
        finally:
            if root:
                os.seteuid(0)
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1 and re.search("[Pp]ermission denied", err), (line, err)


def test_a_full_disk_while_writing_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import errno

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    from convergent import tables

    monkeypatch.setitem(tables._WRITERS, ".csv", full)
    (tmp_path / "old.csv").write_text("old")
    assert cli.main(["judge", str(folder / "ok.csv"), "--out", str(tmp_path / "old.csv")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left on device" in err
    assert (tmp_path / "old.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
