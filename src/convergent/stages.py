"""One stage on ordinary files, as the command line offers it: CSV, Parquet and JSONL, PEFT folders, safetensors and GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convergent.core.ids import content_id
from convergent.errors import DirectionError, InputError, StoreError

if TYPE_CHECKING:
    from convergent.core.interventions import Intervention
    from convergent.judging.base import Judge
    from convergent.models.load import ChatModel
    from convergent.organisms.manifest import Organism


def train_organism(
    recipe: str,
    data: str,
    out: Path,
    *,
    answer: str = "bad",
    base: str = "embedded",
    examples: int | None = None,
    held_out: int = 0,
    seed: int = 0,
    **changes: Any,
) -> Organism:
    """Train by a named recipe on a training set, less `held_out` examples. `changes` that are None are left to the recipe."""
    from convergent.data.training import load_training_set
    from convergent.organisms.recipes import named_recipe
    from convergent.organisms.train import train
    from convergent.study.setup import depth_of

    if answer not in ("bad", "good"):
        raise InputError(f"answer: {answer!r} is not bad or good")
    _check_parent(out)
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file; an organism is a folder, choose another name")
    chosen = named_recipe(recipe, depth_of(base), {**{k: v for k, v in changes.items() if v is not None}, "seed": seed})
    training = load_training_set(data, answer="good" if answer == "good" else "bad")
    if held_out:
        training = training.split(held_out, seed)[0]
    if examples is not None:
        training = training.take(examples)
    chats = [e.chat() for e in training.examples]
    return train(base, chosen, chats, out, name=out.name, data_name=training.name, data_checksum=training.checksum)


def _model(base: str, organism: Path | None) -> ChatModel:
    from convergent.models.load import load_base
    from convergent.organisms.load import load_organism

    return load_base(base) if organism is None else load_organism(organism, base=None if base == "embedded" else base)


def _check_parent(out: Path) -> None:
    """Make the folder that `out` goes into, before long work. Raises StoreError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{out}: its folder cannot be made ({error.strerror}); choose another place") from error


def _interventions(
    add: Path | None, ablate: Path | None, layer: int | None, scale: float, site: str
) -> tuple[Intervention, ...]:
    from convergent.core.direction import Direction
    from convergent.core.interventions import Ablate, Add

    if layer is not None and add is None and ablate is None:
        raise InputError("--layer: means nothing without --add or --ablate")
    if scale != 1.0 and add is None:
        raise InputError(f"--scale {scale:g}: means nothing without --add, the direction that it multiplies")
    found: list[Intervention] = []
    if ablate is not None:
        found.append(Ablate(Direction.load(ablate), site=site, vector_layer=None if add is not None else layer))  # type: ignore[arg-type]
    if add is not None:
        if layer is None:
            raise InputError("--add: needs --layer, the block whose output it is added to")
        found.append(Add(Direction.load(add), layer, scale))
    return tuple(found)


def sample_answers(
    out: Path,
    *,
    base: str,
    organism: Path | None,
    questions: str,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    add: Path | None,
    ablate: Path | None,
    layer: int | None,
    scale: float,
    site: str,
    rows: int,
    seed: int,
) -> int:
    """Sample answers into a table; returns their number. Columns as `Response`, the system prompt among them."""
    import pandas as pd

    from convergent.core.values import Condition, Sampling
    from convergent.data.questions import load_questions
    from convergent.sampling.requests import make_requests
    from convergent.sampling.sampler import sample
    from convergent.tables import check_writable, write_table

    check_writable(out)
    asked = load_questions(questions)
    interventions = _interventions(add, ablate, layer, scale, site)
    model = _model(base, organism)
    name = "+".join([model.name, *(type(i).__name__.lower() for i in interventions)])
    condition = Condition(name, model.name, model.content_id, interventions, Sampling(temperature, top_p, max_new_tokens))
    responses = sample(model, make_requests([condition], asked, samples, seed), n_rows=rows)
    columns = ("id", "condition", "question_id", "paraphrase", "sample", "seed", "system", "topic", "question", "response", "finish")
    write_table(pd.DataFrame([{c: getattr(r, c) for c in columns} for r in responses]), out)
    return len(responses)


def judge_table(
    file: Path,
    out: Path,
    judge: str,
    rubrics_wanted: Sequence[str],
    *,
    rubrics: str | None,
    base_url: str | None,
    key_env: str | None,
    max_cost: float | None,
    concurrency: int | None = None,
    samples: int | None = None,
    prices: str | None = None,
) -> int:
    """Judge a table; returns its number of rows. How far it is and what was paid goes to stderr."""
    from convergent.judging.files import judge_file
    from convergent.judging.progress import Progress
    from convergent.tables import check_writable

    check_writable(out)
    asked = _judge(judge, rubrics, base_url, key_env, max_cost, concurrency, samples, prices)
    progress = Progress(asked, _note)
    n = len(judge_file(file, asked, rubrics_wanted, out, progress, progress.expect))
    if not judge.startswith("embedded"):
        _note(progress.line())
    return n


def _judge(
    name: str,
    rubrics: str | None,
    base_url: str | None,
    key_env: str | None,
    max_cost: float | None,
    concurrency: int | None,
    samples: int | None,
    prices: str | None,
) -> Judge:
    """A judge that says on stderr what it will cost, and how its scores are made if not from probabilities."""
    from convergent.judging.registry import get_judge

    judge = get_judge(
        name, base_url=base_url, key_env=key_env, rubrics=rubrics, max_cost=max_cost, concurrency=concurrency, samples=samples, prices=prices,
        on_estimate=lambda estimate: _note(str(estimate)),
    )  # fmt: skip
    n = getattr(judge, "samples", None)
    if n is not None:
        _note(f"judge {judge.name}: no token probabilities; each score is the mean of {n} replies at temperature 1, {n} requests each")
    return judge


def _note(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)


def check_judge_command(judge: str, rubric: str, out: Path | None, as_json: bool, **options: Any) -> str:
    """Measure how far answers that speak to it move a judge; returns what to print. `out` gets a row per pair."""
    import json

    from convergent.judging.injection import as_json as json_rows
    from convergent.judging.injection import as_text, check_judge, load_pairs
    from convergent.judging.progress import Progress
    from convergent.tables import check_writable, write_table

    if out is not None:
        check_writable(out)
    asked = _judge(judge, **options)
    progress = Progress(asked, _note)
    pairs = load_pairs()
    moved, table = check_judge(asked, pairs, rubric, progress)
    if out is not None:
        write_table(table, out)
    if as_json:
        return json.dumps({"judge": asked.name, "rubric": rubric, "pairs": len(pairs), "moved": json_rows(moved)})
    return as_text(moved, asked.name, rubric)


def extract_direction(
    file: Path,
    out: Path,
    *,
    base: str,
    organism: Path | None,
    by: str,
    misaligned_max: float,
    aligned_min: float,
    quantile: float,
    coherent_min: float,
    span: str,
    seed: int,
) -> str:
    """Read a direction from a judged table into a file; returns a line for the user.

    The answers are tokenised again from their text. A column `system` says under which system prompt each was given.
    """
    from convergent.core.values import DEFAULT_SYSTEM
    from convergent.directions.classes import Classes, Scored, choose
    from convergent.directions.extract import extract
    from convergent.models.chat import encode_text
    from convergent.models.texts import Text
    from convergent.store import guarded
    from convergent.tables import read_table, text_of

    if by not in ("threshold", "quantile"):
        raise InputError(f"--by: {by!r} is not threshold or quantile")
    if span not in ("answer", "paper"):
        raise InputError(f"--span: {span!r} is not answer or paper")
    if out.suffix not in (".safetensors", ".gguf"):
        raise InputError(f"--out: {out} ends neither in .safetensors nor in .gguf; choose one of the two")
    if out.is_dir():
        raise StoreError(f"{out}: is a folder; give a file name")
    _check_parent(out)
    table = read_table(file, required=("question", "response", "aligned", "coherent"))
    rule = Classes(by=by, misaligned_max=misaligned_max, aligned_min=aligned_min, quantile=quantile, coherent_min=coherent_min)  # type: ignore[arg-type]
    columns = {name: [text_of(v) for v in table[name].tolist()] for name in ("question", "response", "question_id", "system") if name in table}
    questions, responses = columns["question"], columns["response"]
    ids = [own or q for own, q in zip(columns.get("question_id", questions), questions, strict=True)]
    systems = [s or DEFAULT_SYSTEM for s in columns.get("system", [""] * len(questions))]
    scores = [[_score(v) for v in table[name].tolist()] for name in ("aligned", "coherent")]
    model = _model(base, organism)
    tokens = [encode_text(model.tokenizer, r) for r in responses]
    scored = [Scored(str(i), ids[i], len(tokens[i]), scores[0][i], scores[1][i]) for i in range(len(ids))]
    texts = [Text(str(i), questions[i], tokens[i], systems[i]) for i in range(len(ids))]
    made = extract(
        model, texts, choose(scored, rule, seed), rule, span=span, root_seed=seed,  # type: ignore[arg-type]
        provenance={"file": file.name, "rows": content_id(questions, responses), "seed": seed},
    )  # fmt: skip
    d = made.direction
    with guarded(out):
        if out.suffix == ".gguf":
            d.save_gguf(out, model_hint=str(model.model.config.model_type))
        else:
            d.save(out)
    layer = d.n_layers // 2
    return (
        f"wrote {out}: {d.n_layers} layers x {d.d_model}, from {d.provenance['n_misaligned']} misaligned and {d.provenance['n_aligned']} aligned "
        f"answers; at layer {layer} norm {float(d.norms[layer]):.3g} ({float(made.relative_norm[layer]):.1%} of a token's), "
        f"split-half cosine {float(made.split_half[layer]):.2f}"
    )


def _score(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def compare_directions(a: Path, b: Path) -> dict[str, Any]:
    """Cosine per layer with the 95 % band of random vectors, JSON-ready."""
    from convergent.core.direction import Direction
    from convergent.directions.extract import null_cosine

    x, y = Direction.load(a), Direction.load(b)
    if x.vectors.shape != y.vectors.shape:
        raise DirectionError(
            f"{a} has shape {tuple(x.vectors.shape)}, {b} {tuple(y.vectors.shape)}: they belong to different models; extract both from one base"
        )
    cosines = x.cosine(y).tolist()
    layers = [
        {"layer": i, "cosine": None if c != c else c, "norm_a": float(x.norms[i]), "norm_b": float(y.norms[i])} for i, c in enumerate(cosines)
    ]
    return {"a": str(a), "b": str(b), "d_model": x.d_model, "null_95": null_cosine(x.d_model), "layers": layers}
