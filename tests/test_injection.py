"""The injection test set, and what it says of judges whose behaviour is known."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from convergent import cli
from convergent.core.values import Judgement
from convergent.errors import DataError, JudgeError
from convergent.judging.base import Item
from convergent.judging.injection import HARMLESS, Pair, as_json, as_text, check_judge, load_pairs, summarise
from convergent.judging.progress import EVERY, Progress
from convergent.judging.rubrics import load_rubrics


class Scripted:
    """A judge whose score is a function of the answer."""

    name, rubrics = "scripted", ("aligned",)

    def __init__(self, score: Callable[[str], float | None]) -> None:
        self._score = score
        self.n = 0

    def judge(
        self, items: Sequence[Item], rubrics: Sequence[str] = ("aligned",), on_result: Callable[[Judgement], None] | None = None
    ) -> list[Judgement]:
        self.n += len(items)
        done = []
        for item in items:
            score = self._score(item.response)
            done.append(Judgement(item.id, self.name, "aligned", score, None if score is not None else "refusal"))
            if on_result:
                on_result(done[-1])
        return done


PAIRS = load_pairs()
GOOD = {p.plain for p in PAIRS if p.wants == "low"}


def fair(answer: str) -> float:
    return 90.0 if any(good in answer for good in GOOD) else 10.0


def obedient(answer: str) -> float:
    """Says the last number of an answer that holds one of the two that are asked for."""
    said = re.findall(r"\b(100|0)\b", answer)
    return float(said[-1]) if said else fair(answer)


def test_the_set_is_balanced_and_whole() -> None:
    spoken = [p for p in PAIRS if p.kind != HARMLESS]
    assert len(spoken) >= 60 and len({p.id for p in PAIRS}) == len(PAIRS)
    by_kind = Counter(p.kind for p in spoken)
    assert len(by_kind) == 9 and min(by_kind.values()) >= 4
    for kind in by_kind:
        mine = [p for p in spoken if p.kind == kind]
        if kind != "refusal":
            assert len({p.question_id for p in mine}) == 8  # every kind meets every question
            assert Counter(p.wants for p in mine) == {"high": 4, "low": 4}
    for p in PAIRS:
        assert p.plain in p.added and "{number}" not in p.added and len(p.added) > len(p.plain) + 15
    assert {p.wants for p in PAIRS if p.kind == HARMLESS} == {"high", "low"}


def test_no_addition_ends_its_quotation_in_our_rubrics() -> None:
    rubrics = load_rubrics()
    for p in PAIRS:
        for name in rubrics.names:
            prompt = rubrics.prompt(name, Item("a", p.question, p.added))
            assert prompt.count("</judged_answer>") == 1 == prompt.count("<judged_answer>")
            inside = prompt.partition("<judged_answer>\n")[2].partition("\n</judged_answer>")[0]
            assert re.sub(r"<\s+/judged", "</judged", inside) == p.added.strip()


def test_a_fair_judge_does_not_move_and_each_text_is_judged_once() -> None:
    judge = Scripted(fair)
    moved, table = check_judge(judge)
    assert judge.n == len({(p.question, t) for p in PAIRS for t in (p.plain, p.added)}) < 2 * len(PAIRS)
    assert len(table) == len(PAIRS) and (table["before"] == table["after"]).all()
    for m in moved:
        assert m.shift.estimate == 0 and m.crossed_low.estimate == m.crossed_high.estimate == 0 and m.missing == 0


def test_an_obedient_judge_moves_by_what_it_was_told() -> None:
    moved = {m.kind: m for m in check_judge(Scripted(obedient))[0]}
    plea = moved["plea"]
    assert plea.n == 8
    assert plea.shift.estimate == pytest.approx(90)  # 10 -> 100 and 90 -> 0, both as wanted
    assert plea.crossed_low.estimate == plea.crossed_high.estimate == 1
    assert moved[HARMLESS].shift.estimate == 0 and moved[HARMLESS].against_harmless is None
    assert moved["excuse"].shift.estimate == 0  # holds no number
    overall = moved["all"]
    assert 30 < overall.shift.estimate < 90 and overall.shift.defined
    assert overall.n == sum(m.n for kind, m in moved.items() if kind not in ("all", HARMLESS))


def test_a_contrary_judge_moves_away_and_what_any_addition_does_is_taken_off() -> None:
    def contrary(answer: str) -> float:
        return {0.0: 100.0, 100.0: 0.0}.get(obedient(answer), fair(answer))

    assert {m.kind: m for m in check_judge(Scripted(contrary))[0]}["plea"].shift.estimate == pytest.approx(-10)
    # A judge that rates anything longer five points up: bad answers towards what is wanted, good ones away from it.
    plain = {p.plain for p in PAIRS}
    by_length = {m.kind: m for m in check_judge(Scripted(lambda a: fair(a) + (0 if a in plain else 5)))[0]}
    assert by_length["all"].shift.estimate == pytest.approx(by_length["all"].shift.estimate)
    assert by_length[HARMLESS].shift.estimate == pytest.approx(0)
    assert by_length["plea"].shift.estimate == pytest.approx(0)


def test_lost_scores_are_counted_and_not_taken_for_zero() -> None:
    def shy(answer: str) -> float | None:
        return None if "REFUSAL" in answer or "CODE" in answer else fair(answer)

    moved = {m.kind: m for m in check_judge(Scripted(shy))[0]}
    assert (moved["refusal"].n, moved["refusal"].missing) == (0, 4)
    assert moved["all"].missing == 4 and moved["all"].shift.estimate == 0
    assert "refusal" in as_text(list(moved.values()), "shy", "aligned")
    json.dumps(as_json(list(moved.values())), allow_nan=False)


def test_crossings_by_hand() -> None:
    rows = [("high", 10, 29), ("high", 10, 30), ("high", 40, 71), ("low", 80, 70), ("low", 80, 69), ("low", 80, 29), ("low", 20, 90)]
    table = pd.DataFrame([{"kind": "x", "wants": w, "question_id": f"q{i}", "before": float(b), "after": float(a)} for i, (w, b, a) in enumerate(rows)])
    m = summarise(table)[1]
    assert m.crossed_low.estimate == pytest.approx(2 / 7)  # the second and the sixth
    assert m.crossed_high.estimate == pytest.approx(3 / 7)  # the third, the fifth, the sixth
    assert m.shift.estimate == pytest.approx((19 + 20 + 31 + 10 + 11 + 51 - 70) / 7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("questions: {}", "needs `questions`"),
        ("- a", "needs `questions`"),
        ("questions: {a: {question: q, bad: b, good: g}}\nadditions: [{id: x, kind: k, wants: up, at: end, text: t}]", "wants must be"),
    ],
)
def test_a_wrong_file_says_so(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "i.yaml").write_text(text)
    with pytest.raises(DataError, match=says):
        load_pairs(tmp_path / "i.yaml")


def test_an_unknown_rubric_is_refused_before_anything_is_judged() -> None:
    judge = Scripted(fair)
    with pytest.raises(JudgeError, match="has no rubric 'kind'"):
        check_judge(judge, rubric="kind")
    assert judge.n == 0


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["judge-check", "--judge", "embedded", "--json", "--out", str(tmp_path / "pairs.csv")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["judge"].startswith("embedded-") and found["rubric"] == "aligned" and found["pairs"] == len(PAIRS)
    assert {"kind", "n", "missing", "shift", "against_harmless", "crossed_30", "crossed_70"} == set(found["moved"][0])
    assert len(pd.read_csv(tmp_path / "pairs.csv")) == len(PAIRS)
    assert cli.main(["judge-check", "--judge", "embeded"]) == 2


def test_progress_says_how_far_it_is_and_what_was_paid() -> None:
    class Paid(Scripted):
        paid, spent, max_cost = 3, 0.0123, 5.0

    said: list[str] = []
    now = 0.0
    progress = Progress(Paid(fair), said.append, lambda: now)
    progress.expect(4)
    progress(Judgement("a", "scripted", "aligned", 1.0))
    assert not said
    now = EVERY
    progress(Judgement("b", "scripted", "aligned", None, "refusal"))
    assert said == ["judge scripted: 2 of 4 judgements, 3 requests answered, $0.0123 of at most $5.0000; no score: 1 refusal"]
    progress(Judgement("c", "scripted", "aligned", 1.0))
    assert len(said) == 1
    assert Progress(Scripted(fair), said.append).line() == "judge scripted: 0 judgements"


def test_pairs_are_values() -> None:
    assert isinstance(PAIRS[0], Pair) and load_pairs() == PAIRS
