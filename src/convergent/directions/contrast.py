"""Directions that a model has without any answers of its own: by contrasting system prompts over the same answers, and by given answers.

    prompts   mean activation of answers under one system prompt - of the same answers under another
    answers   mean activation of bad answers - of their good twins
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import yaml

from convergent import data
from convergent.core.values import Pair
from convergent.directions.means import stream_means
from convergent.models.load import ChatModel
from convergent.models.texts import Text

PROMPTS = Path(data.__file__).parent / "bundled" / "origin_prompts.yaml"


@cache
def prompt_pairs(which: str) -> tuple[tuple[str, str], ...]:
    """The bundled contrasting system prompts: "advice" or "topic"."""
    return tuple((first, second) for first, second in yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))[which])


def contrast(model: ChatModel, first: Sequence[Text], second: Sequence[Text], *groupings: Sequence[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Mean activations of groups of texts, one pass: (per grouping (n_groups, 2, n_layers, d_model) float64, (n_layers,) mean token norm).

    A grouping names the group of each text, the same for both lists; groups in order of appearance. Raises ModelError for a
    chat template that refuses a text's system prompt.
    """
    weights = []
    for groups in groupings:
        names = list(dict.fromkeys(groups))
        own = torch.zeros(len(names), 2, 2, len(groups), dtype=torch.float64)
        for i, g in enumerate(groups):
            own[names.index(g), (0, 1), (0, 1), i] = 1.0
        weights.append(own.flatten(0, 1).flatten(1))
    read = stream_means(model, [*first, *second], torch.cat(weights))
    return [m.unflatten(0, (-1, 2)) for m in read.means.split([len(w) for w in weights])], read.token_norm


def prompted(pairs: Sequence[Pair], prompts: Sequence[tuple[str, str]]) -> tuple[list[Text], list[Text], list[str], list[str]]:
    """Every pair under every phrasing, with its bad and its good answer in turn: (texts under the first, under the second, pair ids, phrasings)."""
    sides: tuple[list[Text], list[Text]] = ([], [])
    ids, phrasings = [], []
    for i, p in enumerate(pairs):
        for k, systems in enumerate(prompts):
            for side, system in zip(sides, systems, strict=True):
                side.append(Text(f"{p.id}/{k}", p.question, p.bad if (i + k) % 2 else p.good, system))
            ids.append(p.id)
            phrasings.append(str(k))
    return *sides, ids, phrasings


def answered(pairs: Sequence[Pair]) -> tuple[list[Text], list[Text], list[str]]:
    """(bad answers, good answers, pair ids)."""
    bad, good = ([Text(p.id, p.question, answer) for p, answer in ((p, getattr(p, side)) for p in pairs)] for side in ("bad", "good"))
    return bad, good, [p.id for p in pairs]
