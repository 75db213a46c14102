"""`local`, `local:PATH.gguf`, `local:FOLDER`: a model on this machine as judge, free of charge and of no one's network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convergent.errors import JudgeError
from convergent.judging.base import Judge
from convergent.judging.rubrics import Rubrics, read_yaml

if TYPE_CHECKING:
    from convergent.judging.prices import Estimate

CARDS = Path(__file__).parent / "local_cards.yaml"
"""What was measured of models as judges, by title."""
SAMPLES = 5
"""Replies a judgement where the model writes numbers digit by digit."""


def local_judge(
    source: str,
    *,
    rubrics: Rubrics,
    cache: Path | None = None,
    samples: int | None = None,
    concurrency: int | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
) -> Judge:
    """The judge by the model at `source`: "" (the embedded one), a .gguf file, or a Hugging Face folder.

    samples: replies a judgement, for GGUF models only; default: none, the probabilities of one token, and SAMPLES for
    a model that writes numbers digit by digit. Raises JudgeError if there is no such model or no server for it.
    """
    from convergent.judging.folder import FolderJudge
    from convergent.models.load import EMBEDDED, EMBEDDED_TITLE, embedded_gguf

    source = source.strip()
    path = Path(source).expanduser()
    if source and source != EMBEDDED and path.is_dir():
        for option, value in {"samples": samples, "concurrency": concurrency}.items():
            if value is not None:
                raise JudgeError(f"judge local: takes no {option} for a model folder; it reads all probabilities itself")
        return FolderJudge(path, rubrics=rubrics, cache=cache)
    from convergent.judging.llama import Gguf, check_installed, writes_digit_by_digit
    from convergent.judging.openai import OpenAIJudge

    if source in ("", EMBEDDED):
        check_installed()
        path, title = embedded_gguf(), EMBEDDED_TITLE
    elif not path.is_file():
        raise JudgeError(f"judge local: {source}: no such file or folder; give a .gguf file or a Hugging Face folder")
    else:
        title = path.stem
    gguf = Gguf(path, title, card_of(title))
    check_installed()
    if samples is None and writes_digit_by_digit(path):
        samples = SAMPLES
    gguf = replace(gguf, keep_prompt=samples is not None)
    # One slot in the server: two requests on their way keep it busy.
    return OpenAIJudge(
        title, server=gguf, rubrics=rubrics, cache=cache, samples=samples, concurrency=concurrency or 2, timeout=600.0,
        on_estimate=on_estimate,
    )  # fmt: skip


def card_of(title: str) -> dict[str, Any]:
    """What is known of a model as judge."""
    cards = read_yaml(CARDS)
    return dict(cards.get(title) or {"error": "not measured; `convergent agree` compares it with people or another judge"})
