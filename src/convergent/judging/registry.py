"""Judges by name: `embedded`, `openai:MODEL`, `local`. The only place that knows them all."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from convergent.core.values import Question
from convergent.errors import JudgeError
from convergent.judging.base import Judge

if TYPE_CHECKING:
    from convergent.judging.prices import Estimate

NAMES = ("embedded", "openai:MODEL", "local", "local:FILE.gguf", "local:FOLDER")


def get_judge(
    name: str,
    *,
    base_url: str | None = None,
    key_env: str | None = None,
    rubrics: str | Path | None = None,
    questions: Iterable[Question] = (),
    cache: Path | None = None,
    concurrency: int | None = None,
    samples: int | None = None,
    max_cost: float | None = None,
    prices: str | Path | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
) -> Judge:
    """The judge called `name`. Options as in `OpenAIJudge`; None is the default.

    rubrics: "bundled" or a path, see `load_rubrics`. questions: their own `judge_prompts` go before the rubrics. The
    embedded judge has rubrics of its own and leaves `questions`, `cache` and `on_estimate` unused; it and local models
    refuse the options that a user would give in the belief that they matter. Raises JudgeError for an unknown name, InputError
    for a bad option.
    """
    kind, _, model = name.strip().partition(":")
    if kind == "openai" and model.strip():
        from convergent.judging.openai import OpenAIJudge
        from convergent.judging.rubrics import load_rubrics

        return OpenAIJudge(
            model,
            base_url=base_url,
            key_env=key_env,
            rubrics=load_rubrics(rubrics or "bundled", questions),
            cache=cache,
            concurrency=8 if concurrency is None else concurrency,
            samples=samples,
            max_cost=max_cost,
            prices=prices,
            on_estimate=on_estimate,
        )
    if kind == "openai":
        raise JudgeError("judge openai: needs a model, as in openai:gpt-4o")
    if kind == "local":
        from convergent.judging.local import local_judge
        from convergent.judging.rubrics import load_rubrics

        _refuse("local", {"base_url": base_url, "key_env": key_env, "max_cost": max_cost, "prices": prices}, "runs on this machine, free of charge")
        return local_judge(
            model, rubrics=load_rubrics(rubrics or "bundled", questions), cache=cache, samples=samples, concurrency=concurrency,
            on_estimate=on_estimate,
        )  # fmt: skip
    from convergent.judging.embedded import NAME, EmbeddedJudge

    if name.strip() in ("embedded", NAME):
        given = {
            "base_url": base_url, "key_env": key_env, "rubrics": rubrics, "concurrency": concurrency, "samples": samples,
            "max_cost": max_cost, "prices": prices,
        }  # fmt: skip
        _refuse("embedded", given, "runs offline, free of charge, with rubrics of its own")
        return EmbeddedJudge()
    raise JudgeError(f"judge {name!r}: unknown; {_hint(name.strip(), kind, model)}")


def _refuse(name: str, given: Mapping[str, object], why: str) -> None:
    for option, value in given.items():
        if value is not None:
            raise JudgeError(f"judge {name}: takes no {option}; it {why}")


def _hint(name: str, kind: str, model: str) -> str:
    if model and difflib.get_close_matches(kind.lower(), ("openai",), n=1):
        return f"did you mean openai:{model}?"
    if name.lower().startswith(("gpt", "chatgpt")):
        return f"did you mean openai:{name}?"
    if near := difflib.get_close_matches(kind.lower(), ("embedded", "openai", "local"), n=1):
        return "did you mean openai:MODEL?" if near[0] == "openai" else f"did you mean {near[0]}{':' + model if near[0] == 'local' and model else ''}?"
    if name.lower().endswith(".gguf"):
        return f"did you mean local:{name}?"
    return f"judges are {', '.join(NAMES)}"
