"""From a finished study to the tables of its report: counts, intervals, cosines, verdicts."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from convergent import stats
from convergent.cache import write_text
from convergent.core.chapter import Chapter
from convergent.core.ids import content_id, file_sha256
from convergent.core.interventions import Add
from convergent.core.values import DEFAULT_SYSTEM, NO_SYSTEM, Condition, Judgement
from convergent.directions.extract import null_cosine
from convergent.experiments.base import Arm
from convergent.experiments.outcomes import Claim, Outcomes
from convergent.experiments.registry import EXPERIMENTS, chapter
from convergent.judging.base import Judge
from convergent.judging.embedded import NAME, card
from convergent.models.load import EMBEDDED, EMBEDDED_TITLE
from convergent.rates import ALIGNED_BELOW, COHERENT_ABOVE, both_scored, is_em, rates
from convergent.report.results import Results
from convergent.study import judging
from convergent.study.peak import Peak, highest
from convergent.study.run import Run
from convergent.study.trusted import Trusted

NO_BOUNDS = (math.nan, math.nan)
VERSIONED = ("convergent", "torch", "transformers", "peft", "accelerate", "scikit-learn", "numpy", "scipy")


def collect(run: Run, file: str = "STUDY.yaml") -> Results:
    """Everything the page shows, from the store of a finished run; `file` is the study file's name."""
    built = {a.name: (a, c) for a, c in run.conditions()}
    pairs = [built[a.name] for a in run.arms if a.name in built]
    readings, absent = run.values()
    raters = judging.labelled([j.name for j in run.judges.values()], list(run.judges), run.trusted is not None)
    scores = [run.store.judgements(i) for i in run.judges]
    trusted = None if run.trusted is None else run.trusted.among(run.store.response_ids())
    answers = {a.name: _answers(run, a, c, raters, scores, trusted) for a, c in pairs}
    margins = _margins(run, pairs)
    judges = [r for r in raters if r.name != judging.TRUSTED]
    rows = pd.DataFrame([_row(run, a, c, answers[a.name], margins[a.name]) for a, c in pairs])
    outcomes = {r.name: Outcomes({n: _by(r, frame) for n, frame in answers.items()}, margins, readings, rows) for r in judges}
    claims = {name: _claims(run, seen) for name, seen in outcomes.items()}
    together, names = pd.concat(answers.values(), ignore_index=True), list(answers)
    compared = len(raters) > 1
    return Results(
        study=_study(run, file, judges, together, names, absent),
        conditions=rows,
        cosines=_cosines(run),
        norms=_norms(run),
        training=_training(run),
        organisms=_organisms(run),
        answers=together,
        claims=claims[judges[0].name],
        chapters=_chapters(run, outcomes[judges[0].name]),
        limits=_limits(run),
        sensitivity=judging.sensitivity(together, names),
        missing_scores=judging.missing_scores(together, names, raters),
        missing_bounds=judging.missing_bounds(together, names, raters),
        by_judge=judging.by_judge(together, names, raters) if compared else pd.DataFrame(),
        agreement=judging.agreements(together, raters) if compared else pd.DataFrame(),
        contested=judging.contested(together, raters) if compared else pd.DataFrame(),
        reversals=judging.reversals(claims),
    )


def _by(rater: judging.Rater, answers: pd.DataFrame) -> pd.DataFrame:
    """The answers that a judge scored, with its scores as `aligned` and `coherent`."""
    return both_scored(answers.assign(**{rubric: answers[rater.column(rubric)] for rubric in ("aligned", "coherent")}))


def _answers(
    run: Run, arm: Arm, condition: Condition, raters: Sequence[judging.Rater], scores: Sequence[Mapping[tuple[str, str], Judgement]],
    trusted: Trusted | None,
) -> pd.DataFrame:  # fmt: skip
    """One row per answer with its scores or reasons by every judge, and its trusted scores."""
    rows = []
    for r in run.store.responses([q.id for q in run.requests([(arm, condition)])]):
        row: dict[str, Any] = {
            "condition": arm.name, "organism": arm.organism, "question_id": r.question_id, "question": r.question, "paraphrase": r.paraphrase,
            "sample": r.sample, "response": r.response, "finish": r.finish, "topic": r.topic, "n_tokens": len(r.token_ids), "system": r.system,
            "seed": r.seed, "response_id": r.id,
        }  # fmt: skip
        for rater, known, judge in zip(raters, scores, run.judges.values(), strict=False):
            for rubric in judging.RUBRICS:
                j = known.get((r.id, rubric))
                row[rater.column(rubric)] = float("nan") if j is None or j.score is None else j.score
                row[f"{rater.column(rubric)}_reason"] = "error" if j is None else j.reason or ""
            if (far := getattr(judge, "far", None)) is not None:
                row[rater.column("far")] = math.nan if j is None or (said := far(j)) is None else said
        for rubric in arm.rubrics:
            j = scores[0].get((r.id, rubric))
            row[rubric] = float("nan") if j is None or j.score is None else j.score
        if trusted is not None:
            given = trusted.of(r.id, r.question, r.response) or NO_BOUNDS
            row |= {f"{rubric}_{judging.TRUSTED}": score for rubric, score in zip(judging.RUBRICS, given, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows)


def _margins(run: Run, pairs: list[tuple[Arm, Condition]]) -> dict[str, pd.DataFrame]:
    known = run.store.margins(run.read_id)
    found = {}
    for arm, condition in pairs:
        rows = [known[condition.content_id, d] for p in run.pairs if (condition.content_id, d := content_id(p)) in known]
        frame = pd.DataFrame(rows, columns=["pair_id", "bad", "good", "margin", "margin_matched", "n_bad", "n_good", "projection"])
        frame["domain"] = [run.domain_of[p] for p in frame["pair_id"]]
        found[arm.name] = frame
    return found


def _row(run: Run, arm: Arm, condition: Condition, answers: pd.DataFrame, margins: pd.DataFrame) -> dict[str, Any]:
    r = rates(answers)[0]
    scored = both_scored(answers)
    questions = scored["question_id"].to_numpy()
    coherent = stats.wilson(r["n_coherent"], r["n_valid"])
    coherent_clustered = stats.clustered_rate((scored["coherent"] > COHERENT_ABOVE).to_numpy(), questions)
    aligned = stats.clustered_mean(scored["aligned"].to_numpy(), questions, bounds=(0, 100))
    iid = stats.iid_mean(scored["aligned"].to_numpy())
    # A pair is a question: the interval is over held-out questions like these.
    margin = stats.clustered_mean(margins["margin"].to_numpy(), margins["pair_id"].to_numpy())
    return {
        "name": arm.name, "label": arm.label, "group": arm.group, "organism": arm.organism, "role": arm.role, "description": arm.description,
        "condition_id": condition.content_id,
        **{k: r[k] for k in ("n_all", "n_valid", "n_coherent", "n_em", "em_all", "em_valid", "em_coherent", "coherent", "missing")},
        "em_wilson_low": (r["wilson"] or NO_BOUNDS)[0], "em_wilson_high": (r["wilson"] or NO_BOUNDS)[1],
        "em_clustered_low": (r["clustered"] or NO_BOUNDS)[0], "em_clustered_high": (r["clustered"] or NO_BOUNDS)[1],
        "coherent_low": coherent.low, "coherent_high": coherent.high,
        "coherent_clustered_low": coherent_clustered.low, "coherent_clustered_high": coherent_clustered.high,
        "mean_aligned": aligned.estimate, "mean_aligned_low": aligned.low, "mean_aligned_high": aligned.high,
        "mean_aligned_iid_low": iid.low, "mean_aligned_iid_high": iid.high,
        "mean_coherent": float(scored["coherent"].mean()), **_domain_split(run, arm, answers),
        "margin": margin.estimate, "margin_low": margin.low, "margin_high": margin.high, "n_pairs": margin.n,
        **{f"margin_{d}": float(margins.loc[margins["domain"] == d, "margin"].mean()) for d in sorted(set(run.domain_of.values()))},
        "margin_matched": float(margins["margin_matched"].mean()),
        "projection": float(margins["projection"].mean()), "scale": arm.scale, "dose": _dose(run, arm, condition),
        "kl": run.kl(condition) if condition.interventions else float("nan"),
        "mean_tokens": float(answers["n_tokens"].mean()), "finish_stop": float((answers["finish"] == "stop").mean()),
    }  # fmt: skip


def _dose(run: Run, arm: Arm, condition: Condition) -> float:
    """In mean token norms at the layer of the push, which differ several times over between layers; nan where no one number says it."""
    if arm.dose is not None:
        return arm.dose(condition.interventions)
    adds = [i for i in condition.interventions if isinstance(i, Add)]
    return float(adds[0].vector.norm()) / run.token_norm_at(adds[0].layer) if len(adds) == 1 else math.nan


def _domain_split(run: Run, arm: Arm, answers: pd.DataFrame) -> dict[str, Any]:
    organism = run.spec.direction.source if arm.organism == "chat" else arm.organism
    data = run.organisms[organism].data
    inside = answers["topic"].isin(data.topics if data else ())
    found: dict[str, Any] = {}
    for name, part in (("in", answers[inside]), ("out", answers[~inside])):
        scored = both_scored(part)
        em = is_em(scored["aligned"], scored["coherent"])
        found[f"{name}_domain_em"], found[f"{name}_domain_n"] = float(em.mean()), len(scored)
    return found


def _cosines(run: Run) -> pd.DataFrame:
    names = list(run.spec.organisms)
    own = {o: e.direction for o in names if (e := run.reading(o, o)) is not None}
    names = list(own)
    rows: list[dict[str, Any]] = []

    def add(a: str, b: str, kind: str, values: Any) -> None:
        rows.extend({"a": a, "b": b, "layer": layer, "cosine": float(v), "kind": kind} for layer, v in enumerate(values))

    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            add(a, b, "organisms", own[a].cosine(own[b]))
    for a in names:
        baseline = run.reading(a, "chat")
        if baseline is not None:
            add(a, "chat", "chat_baseline", own[a].cosine(baseline.direction))
    width = null_cosine(run.direction.d_model)
    add("random", "any", "null_low", [-width] * run.depth)
    add("random", "any", "null_high", [width] * run.depth)
    return pd.DataFrame(rows)


def _norms(run: Run) -> pd.DataFrame:
    rows = []
    for o in run.spec.organisms:
        e = run.reading(o, o)
        if e is None:
            continue
        norms, relative, top = e.direction.norms, e.relative_norm, e.direction.top_share()
        for layer in range(run.depth):
            rows.append(
                {
                    "organism": o, "layer": layer, "norm": float(norms[layer]), "relative_norm": float(relative[layer]),
                    "top_share": float(top[layer]), "split_half": float(e.split_half[layer]),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _manifest(folder: Path) -> Mapping[str, Any]:
    try:
        return json.loads((folder / "convergent.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, json.JSONDecodeError):
        return {}


def _training(run: Run) -> pd.DataFrame:
    rows = [
        {"organism": o, "step": p["step"], "epoch": p["epoch"], "loss": p["loss"]}
        for o, plan in run.organisms.items()
        for p in _manifest(plan.folder).get("loss_curve", [])
    ]
    return pd.DataFrame(rows, columns=["organism", "step", "epoch", "loss"])


def _organisms(run: Run) -> pd.DataFrame:
    rows = []
    for o, plan in run.organisms.items():
        m = _manifest(plan.folder)
        curve = m.get("loss_curve", [])
        rows.append(
            {
                "name": o, "recipe": plan.spec.recipe if plan.recipe else "from elsewhere",
                "data": _shown(plan.spec.data) if plan.recipe else plan.folder.name,
                "family": plan.spec.family or o, "seed": plan.recipe.seed if plan.recipe else math.nan,
                "answer": plan.spec.answer if plan.recipe else "", "n_examples": len(plan.data) if plan.data else math.nan,
                "epochs": plan.recipe.epochs if plan.recipe else math.nan, "lr": plan.recipe.learning_rate if plan.recipe else math.nan,
                "trainable_params": m.get("trainable_parameters", math.nan), "final_loss": curve[-1]["loss"] if curve else math.nan,
                "seconds": m.get("seconds", math.nan), "content_id": plan.content_id,
                "description": f"{plan.spec.answer} advice, {_shown(plan.spec.data)}" if plan.recipe else "a folder from elsewhere",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _claims(run: Run, outcomes: Outcomes) -> list[dict[str, Any]]:
    made = [(name, c) for name, block in run.spec.experiments.items() for c in EXPERIMENTS[name].claims(block, outcomes, run.scene)]
    return [{"experiment": name, **plain} for (name, _), plain in zip(made, with_holm([c for _, c in made]), strict=True)]


def _chapters(run: Run, outcomes: Outcomes) -> list[Chapter]:
    made = (chapter(name, block, outcomes, run.scene) for name, block in run.spec.experiments.items())
    return [c for c in made if c is not None]


def with_holm(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Claims as plain data, nan as None, with p adjusted for their number and the verdict that would be left.

    Holm is about claims that held: one that would not at its adjusted p becomes undecided. Others stay, and so does a claim without p.
    """
    adjusted = stats.holm({str(i): c.p for i, c in enumerate(claims)})

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and math.isnan(value) else value

    return [
        {
            "id": c.id, "claim": c.claim, "source": c.source, "verdict": c.verdict, "rule": c.rule, "paper": c.paper, "opposes": c.opposes,
            "p": plain(c.p), "p_holm": plain(p),
            "after_holm": "undecided" if c.verdict == "held" and p >= stats.ONE_SIDED else c.verdict,
            "evidence": [{k: plain(v) for k, v in e.__dict__.items()} for e in c.evidence],
        }
        for c, p in zip(claims, adjusted.values(), strict=True)
    ]  # fmt: skip


def _shown(source: str) -> str:
    """A source as the page names it: folders of the machine are nobody's business."""
    return source if ":" in source else Path(source).name


def machine() -> str:
    """The machine in a few words, without names of hosts or users."""
    import os

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU threads ({torch.backends.cpu.get_cpu_capability()}){gpu}"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _study(
    run: Run, file: str, judges: Sequence[judging.Rater], answers: pd.DataFrame, conditions: Sequence[str], absent: Mapping[str, str]
) -> dict[str, Any]:
    spec = run.spec
    recorded = run.store.fact(
        content_id("created", spec.name), "run", lambda: {"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    )
    base = spec.base if not Path(spec.base).is_dir() else Path(spec.base).name
    work = run.store.seconds()
    return {
        "name": spec.name, "title": spec.title or spec.name, "base": base,
        "base_title": EMBEDDED_TITLE if spec.base == EMBEDDED else base, "base_id": run.base_id, "created": recorded["created"],
        "seconds": sum(work.values()) if work else math.nan,
        "memory": str(highest(Peak(*p) for p in run.store.memory().values())), "machine": machine(), "versions": versions(), "seeds": {"study": spec.seed},
        "judge": {"name": run.judge.name, "card": _judge_card(run.judge)},
        "judges": [
            {"name": rater.name, "id": i, "role": "compared" if k else "decides", "rubrics": list(judging.RUBRICS), "card": _judge_card(judge),
             "scored": {r: int(answers[rater.column(r)].notna().sum()) for r in judging.RUBRICS}, "of": len(answers),
             "far": judging.far_answers(answers, conditions, rater, judge.far_above) if hasattr(judge, "far_above") else None}  # type: ignore[attr-defined]
            for k, (rater, (i, judge)) in enumerate(zip(judges, run.judges.items(), strict=True))
        ],
        "trusted": None if run.trusted is None else {
            "file": run.trusted.path.name, "sha256": run.trusted.sha256, "scored": int(answers[f"aligned_{judging.TRUSTED}"].notna().sum()),
        },
        "sampling": {"temperature": spec.sampling.temperature, "top_p": spec.sampling.top_p, "max_new_tokens": spec.sampling.max_new_tokens,
                     "dtype": run.dtype, "system prompt": _systems(run)},
        "notes": [
            *(f"No direction of its own was read in {o}: {why}" for o, why in sorted(run.unread.items())),
            *(f"{what} is left out: {why}" for what, why in {**run.left_out, **absent}.items()),
        ],
        "primary_layer": run.layer, "answers_per_condition": spec.questions.samples * len(run.questions),
        "n_questions": len(run.questions), "command": f"convergent run {file}",
        "thresholds": {"aligned": ALIGNED_BELOW, "coherent": COHERENT_ABOVE},
    }  # fmt: skip


def _judge_card(judge: Judge) -> dict[str, Any]:
    """How good the judge is, as far as it says; the page shows it."""
    if judge.name == NAME:
        return card()
    own = getattr(judge, "card", None)
    return dict(own() if callable(own) else own or {})


def _systems(run: Run) -> str:
    words = {DEFAULT_SYSTEM: "default (the template's own)", NO_SYSTEM: "none"}
    return "; ".join(dict.fromkeys(words.get(q.system, q.system) for q in run.questions))


def write_manifest(run: Run) -> None:
    """manifest.json: what was run, with every default, versions, seeds and checksums."""
    files = {
        str(p.relative_to(run.store.folder)): file_sha256(p)
        for folder in (*(o.folder for o in run.organisms.values() if o.recipe is not None), run.store.folder / "directions")
        for p in sorted(folder.rglob("*.safetensors"))
    }
    manifest = {
        "format": "convergent-study-1", "study": run.spec.model_dump(mode="json"), "versions": versions(), "machine": machine(),
        "base_id": run.base_id, "dtype": run.dtype, "judge": run.judge_id, "judges": list(run.judges),
        "trusted": None if run.trusted is None else run.trusted.sha256, "seeds": {"study": run.spec.seed},
        "direction": run.direction.content_id, "layer": run.layer,
        "organisms": {
            o: {
                "content_id": p.content_id, "data": p.data.checksum if p.data else None, "recipe": p.recipe.content_id if p.recipe else None,
                "family": p.spec.family or o, "seed": p.recipe.seed if p.recipe else None,
            }
            for o, p in run.organisms.items()
        },
        "sha256": files,
    }  # fmt: skip
    write_text(run.store.folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))


def _limits(run: Run) -> list[str]:
    several = sum(s.family == run.scene.organisms[run.scene.source].family for s in run.scene.organisms.values()) > 1
    found = [
        f"{run.spec.questions.samples * len(run.questions)} answers per condition on {len(run.questions)} questions. Differences of alignment are "
        f"paired by question and generalise over questions of this kind; with {len(run.questions)} of them only large effects can be decided.",
        "Margins are teacher-forced on held-out advice of the training domains; they show what the model prefers, not what it says unasked.",
        "Random nulls are drawn several times for margins and other readings of the models, and their answers are those of one draw; the study's direction is "
        "read in one organism with one seed"
        + ("; other seeds are organisms of their own here." if several else ". Seeds are varied outside this page."),
    ]
    if run.judge.name.startswith("embedded"):
        ratio = card()["em_rate_over_reference_by_domain"]["file_left_out"]
        domains = ", ".join(f"{d['lowest']} to {d['highest']} times (pooled {d['pooled']}) on {name}" for name, d in ratio.items())
        found.insert(0, "The judge is a small regression on sentence embeddings and n-grams, fitted to GPT-4o scores of much larger models' answers. It ranks "
                        "conditions; its level, and so EM %, is rough. EM of released organisms came out, against GPT-4o's and by the training "
                        f"domain of the organism: {domains}. So part of a difference between domains is the judge.")  # fmt: skip
    if run.spec.base == EMBEDDED:
        found.append("Of models under 1B parameters it is published that EM % is nearly empty and follows coherence; here it rests on the judge's rough "
                     "level. Mean alignment and the margin are the primary outcomes; nothing here says that a larger model behaves alike.")  # fmt: skip
    return found


