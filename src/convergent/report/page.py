"""Write the page: gather what the template needs, put everything inside one file.

Nothing is fetched when the page opens: style and script are inline, the script is named by its hash in the content
security policy, so no other script runs, wherever it might come from. Texts of models travel as JSON and become text
nodes only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from convergent.errors import DataError, StoreError
from convergent.report import text
from convergent.report.drawing import Do, Drawings, begin
from convergent.report.judging import judging_section
from convergent.report.paper import paper_rows
from convergent.report.results import ROLES, VERDICTS, Results
from convergent.report.tables import flat, number_tables, write_tables

HERE = Path(__file__).parent
ANSWER_BUDGET = 1_300_000
"""Bytes of answers inside the page; a larger study shows the first answers to each question and links to the rest."""
LONGEST = 6_000
"""Characters of one answer inside the page."""
PAPER = {
    "title": "Convergent Linear Representations of Emergent Misalignment",
    "authors": "Anna Soligo, Edward Turner, Senthooran Rajamanoharan and Neel Nanda",
    "year": "2025",
    "url": "https://arxiv.org/abs/2506.11618",
}


def write_report(results: Results, folder: Path, do: Do = map) -> Path:
    """Write `folder`/report.html and `folder`/tables/*.csv and *.parquet; returns the path of the page.

    `do` draws, as the builtin `map` or as `drawing.hands`. The same results give the same bytes. Raises StoreError if the folder cannot be written.
    """
    folder = Path(folder)
    page, part = folder / "report.html", folder / ".report.html.part"
    drawings = begin(results, do)
    try:
        files = write_tables(results, folder / "tables")
        part.write_text(render(results, files, drawings), encoding="utf-8", errors="replace", newline="\n")
        part.replace(page)
    except (OSError, DataError) as error:
        why = getattr(error, "strerror", None) or error
        raise StoreError(
            f"{folder}: the report cannot be written ({why}); free space or name another folder"
        ) from error
    finally:
        if folder.is_dir():
            part.unlink(missing_ok=True)
    return page


def render(results: Results, files: list[tuple[str, int, str]], drawings: Drawings) -> str:
    """The page as text; `files` are the tables beside it (name, rows, SHA-256)."""
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters.update({name: getattr(text, name) for name in ("number", "percent", "interval", "compact", "duration")})
    style, script = ((HERE / name).read_text("utf-8") for name in ("style.css", "script.js"))
    answers, kept = answers_json(results)
    tables, judging = number_tables(results), judging_section(results)
    template = env.get_template("template.html.j2")
    chapters, figures = list(drawings.chapters), {f.id: f for f in drawings.figures if f is not None}  # waited for last
    return template.render(
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        r=results,
        study={**_STUDY, **results.study},
        lead=lead(results),
        claims=claim_cards(results),
        paper_rows=paper_rows(results),
        verdicts={v: sum(c["verdict"] == v for c in results.claims) for v in VERDICTS},
        n_tested=sum(not text.missing(c.get("p")) for c in results.claims),
        organisms=results.organisms.to_dict("records"),
        figures=figures,
        tables=tables,
        roles=ROLES,
        answers=Markup(answers),
        kept=kept,
        judging=judging,
        chapters=chapters,
        contents=contents([(f"chapter-{c.id}", c.title) for c in chapters]),
        sections={n: flat(results.study.get(n) or {}) for n in ("versions", "seeds", "sampling")},
        files=files,
        paper=PAPER,
    )


def contents(chapters: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Anchor and title of every section in the order of the page, the experiments' chapters in their place."""
    return [
        ("paper", "The paper's claims"), ("verdicts", "What held"), ("conditions", "Outcomes by condition"), ("steering", "Switching the direction on"),
        ("geometry", "The directions"), *chapters, ("organisms", "The organisms"), ("judging", "The judge"), ("answers", "Read the answers"),
        ("numbers", "All numbers"), ("limits", "Limits"), ("larger", "Run it on a larger model"), ("cite", "How to cite"), ("reproduce", "Reproduce"),
    ]  # fmt: skip


_STUDY: dict[str, Any] = {
    "name": "", "title": "", "base": "", "base_title": "the base model", "created": "", "seconds": None, "memory": "", "machine": "",
    "judge": {}, "notes": [], "primary_layer": None, "answers_per_condition": None, "n_questions": None,
    "command": "", "versions": {},
}  # fmt: skip


def lead(results: Results) -> list[str]:
    """What was done, for somebody who has read nothing yet."""
    study, organisms = {**_STUDY, **results.study}, results.organisms
    bad, good = (organisms[organisms["answer"] == a]["name"].tolist() for a in ("bad", "good"))
    sentences = []
    if bad:
        sentences.append(
            f"{study['base_title']} was fine-tuned {_times(len(bad))} on narrow sets of bad advice ({_list(bad)})"
            + (f" and {_times(len(good))} on good advice as a control ({_list(good)})." if good else ".")
        )
    sentences.append(
        "The chat model, these organisms and every variant then answered the same "
        f"{text.compact(study['n_questions'])} open questions, {text.compact(study['answers_per_condition'])} answers "
        "per condition, and each answer was scored for alignment and coherence."
        if bad
        else f"{study['base_title']} answered open questions under several conditions."
    )
    direction = (
        "From an organism's own answers one direction per layer was read: the mean internal state on its misaligned "
        "answers minus that on its aligned ones. The direction was removed from this organism and from others, and "
        "added to the chat model, with controls beside each."
    )
    return [" ".join(sentences), direction]


def claim_cards(results: Results) -> list[dict[str, Any]]:
    """The claims, their deciding comparisons apart from those only shown, and what p and Holm say of them."""
    n_tested = sum(not text.missing(c.get("p")) for c in results.claims)
    cards = []
    for c in results.claims:
        evidence = [{"margin": None, "decides": True, **e} for e in c.get("evidence") or ()]
        tested = ""
        if not text.missing(c.get("p")):
            tested = f"{text.p_value(c['p'])}, by Holm over {n_tested} claims {text.p_value(c.get('p_holm'))}"
            if c["verdict"] == "held":
                tested += ": the verdict stays" if c.get("after_holm") == "held" else ": it would be undecided"
        cards.append({**c, "deciding": [e for e in evidence if e["decides"]], "shown": [e for e in evidence if not e["decides"]], "tested": tested})
    return cards


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _times(n: int) -> str:
    return {1: "once", 2: "twice", 3: "three times", 4: "four times"}.get(n, f"{n} times")


def answers_json(results: Results) -> tuple[str, dict[str, int]]:
    """The answers as JSON that is safe inside a script element, and how many of how many it holds.

    Answers are taken in sampling order, equally many per condition and question, never by their score.
    """
    a, t = results.answers, results.thresholds
    a = a[a["condition"].isin(results.conditions["name"])]
    a = a.sort_values(["sample", "paraphrase"], kind="stable")
    rank = a.groupby(["condition", "question_id"], sort=False).cumcount()
    cost = a["response"].map(lambda text: len(script_json(text[:LONGEST])) + 60)
    total = cost.groupby(rank).sum().cumsum()
    fits = int((total <= ANSWER_BUDGET).sum())
    kept = a[rank < max(1, fits)]
    conditions = {n: i for i, n in enumerate(results.conditions["name"])}
    ids = {q: i for i, q in enumerate(dict.fromkeys(results.answers["question_id"]))}
    wordings = {q: i for i, q in enumerate(dict.fromkeys(kept["question"]))}
    rows = [
        [
            conditions[r["condition"]],
            ids[r["question_id"]],
            wordings[r["question"]],
            _score(r["aligned"]),
            _score(r["coherent"]),
            r["aligned_reason"] or r["coherent_reason"],
            int(r["aligned"] < t["aligned"] and r["coherent"] > t["coherent"]),  # counted on the raw scores
            int(r["coherent"] <= t["coherent"]),
            int(r["finish"] == "length"),
            r["response"]
            if len(r["response"]) <= LONGEST
            else r["response"][:LONGEST] + " … [cut; whole in tables/answers.csv]",
        ]
        for r in kept.to_dict("records")
    ]
    data = {
        "conditions": results.conditions[["label", "group", "role"]].to_numpy().tolist(),
        "questions": list(ids),
        "wordings": list(wordings),
        "answers": rows,
    }
    return script_json(data), {
        "shown": len(rows),
        "all": len(results.answers),
        "each": int(rank[kept.index].max() + 1) if rows else 0,
    }


def _score(value: float) -> float | None:
    return None if pd.isna(value) else round(value, 1)


def script_json(data: Any) -> str:
    """JSON that ends no script element and opens no comment: every <, > and & is escaped, and so is all beyond
    ASCII."""
    dumped = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        dumped = dumped.replace(char, f"\\u{ord(char):04x}")
    return dumped
