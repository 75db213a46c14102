"""The judge that reads a Hugging Face folder in this process, against forward passes done one by one."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from convergent.core.values import Judgement
from convergent.errors import ConvergentError, JudgeError
from convergent.judging import folder as module
from convergent.judging.base import Item
from convergent.judging.folder import LEAST, FolderJudge, next_tokens
from convergent.judging.registry import get_judge
from convergent.judging.rubrics import Rubrics
from convergent.judging.score import parse_score
from convergent.models.chat import encode_prompt
from convergent.models.load import load_base
from tiny import tiny_model

RUBRICS = Rubrics({"aligned": "{question} {answer} 0 to 100?", "coherent": "Clear? {question} {answer}"})


pytestmark = pytest.mark.usefixtures("one_thread")


def items(n: int) -> list[Item]:
    return [Item(f"r{i}", "Why?", f"Because {'of that ' * (i % 4)}{i}.") for i in range(n)]


def log_p(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """Log probabilities of what follows `ids`, by one plain pass."""
    with torch.inference_mode():
        logits: torch.Tensor = model.model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_every_number_has_the_probability_of_its_digits(family: str) -> None:
    model = load_base(str(tiny_model(family)), dtype="float32")
    prompts = [encode_prompt(model.tokenizer, q) for q in ("Why?", "What would you do with one wish today, or with two?", "So?")]
    digit = [model.tokenizer.encode(str(d), add_special_tokens=False)[-1] for d in range(10)]
    for prompt, found in zip(prompts, next_tokens(model, prompts), strict=True):
        p = {t: v for t, v in found if t.isdecimal()}
        assert len(p) == sum(t.isdecimal() for t, _ in found) and sum(math.exp(v) for _, v in found) < 1 + 1e-6
        first = log_p(model, prompt)
        for n in (7, 10, 34, 85, 99, 100):
            text, want = str(n), 0.0
            ids = prompt
            for d in text:
                want += float(log_p(model, ids)[digit[int(d)]])
                ids = (*ids, digit[int(d)])
            if n == 7:
                want += math.log1p(-float(log_p(model, ids)[digit].exp().sum()))
            if n == 10:
                want += math.log1p(-float(log_p(model, ids)[digit[0]].exp()))
            assert (text in p) == (want > math.log(LEAST)) or abs(want - math.log(LEAST)) < 1e-3
            if text in p:
                assert p[text] == pytest.approx(want, abs=2e-4)
        words = [v for t, v in found if not t.isdecimal()]  # halves of a character read alike
        best = int(first.argmax())
        if best not in digit:
            assert max(words) == pytest.approx(float(first[best]), abs=1e-4)


def test_one_pass_is_enough_where_numbers_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base(str(tiny_model()))
    monkeypatch.setattr(module, "_digits", lambda tokenizer: None)
    prompt = encode_prompt(model.tokenizer, "Why?")
    (found,) = next_tokens(model, [prompt])
    top = log_p(model, prompt).topk(20)
    assert [p for _, p in found] == pytest.approx([float(v) for v in top.values if v > math.log(LEAST)], abs=1e-4)


def test_scores_do_not_depend_on_what_else_is_judged(tmp_path: Path) -> None:
    path = tiny_model("qwen2")
    together = FolderJudge(path, rubrics=RUBRICS, cache=tmp_path / "a.sqlite").judge(items(20))
    for i in (0, 7, 19):
        alone = FolderJudge(path, rubrics=RUBRICS, cache=tmp_path / f"{i}.sqlite").judge(items(20)[i : i + 1])
        for a, b in zip(alone, together[2 * i : 2 * i + 2], strict=True):
            assert (a.response_id, a.rubric, a.reason) == (b.response_id, b.rubric, b.reason)
            assert a.score == (None if b.score is None else pytest.approx(b.score, abs=0.01))
            pairs = json.loads(a.raw)["top"]
            assert parse_score((t, math.exp(p)) for t, p in pairs)[0] == pytest.approx(a.score)


def test_an_interrupted_run_keeps_its_batches_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "c.sqlite"
    monkeypatch.setattr(module, "BATCH_ROWS", 4)
    seen: list[Judgement] = []

    def stop(j: Judgement) -> None:
        seen.append(j)
        if len(seen) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FolderJudge(tiny_model(), rubrics=RUBRICS, cache=cache).judge(items(12), on_result=stop)
    with sqlite3.connect(cache) as db:
        kept = db.execute("SELECT count(*) FROM replies").fetchone()[0]
    db.close()
    assert 10 <= kept < 24
    asked: list[int] = []
    real = module.next_tokens
    monkeypatch.setattr(module, "next_tokens", lambda model, prompts: asked.append(len(prompts)) or real(model, prompts))
    judge = FolderJudge(tiny_model(), rubrics=RUBRICS, cache=cache)
    done = judge.judge([*items(12), Item("empty", "Why?", " ")])
    assert sum(asked) == 24 - kept
    assert [j.reason for j in done[-2:]] == ["empty", "empty"] and len(done) == 26
    asked.clear()
    judge.judge(items(12))
    assert not asked


def test_a_prompt_that_is_too_long_is_an_error_of_its_own(tmp_path: Path) -> None:
    rows = [Item("long", "Why?", "so it is " * 3000), Item("short", "Why?", "so")]
    found = FolderJudge(tiny_model(), rubrics=RUBRICS, cache=tmp_path / "c.sqlite").judge(rows, ["aligned"])
    assert found[0].reason == "error" and "the model reads" in found[0].raw
    assert found[1].reason != "error"


def test_by_name_and_what_it_refuses(tmp_path: Path) -> None:
    judge = get_judge(f"local:{tiny_model()}", cache=tmp_path / "c.sqlite")
    assert judge.name == f"local:{Path(tiny_model()).name}"
    assert "not measured" in json.dumps(judge.card)
    other = get_judge(f"local:{tiny_model('qwen2')}", cache=tmp_path / "c.sqlite")
    assert judge.content_id != other.content_id
    with pytest.raises(JudgeError, match="takes no samples for a model folder"):
        get_judge(f"local:{tiny_model()}", samples=3)
    with pytest.raises(JudgeError, match="no config.json in this folder"):
        get_judge(f"local:{tmp_path}")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ConvergentError, match="broken") as caught:
        get_judge(f"local:{broken}", cache=tmp_path / "c.sqlite").judge(items(1))
    assert "\n" not in str(caught.value)
