"""Massive activations: a few dimensions of the stream that are huge at a few tokens, mostly the first (Sun et al. 2024, arXiv 2402.17762).

They carry an attention sink, the same for every text. Projecting a direction that has any component there out of the stream breaks the sink and so
the model, whatever the direction means: at 135M the first token's norm is 25,000 where others have 170.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convergent.directions.means import block_outputs
from convergent.models.chat import encode_answer
from convergent.models.load import ChatModel
from convergent.models.texts import Text

TIMES = 100.0
"""A dimension is massive where it reaches this many times the layer's median magnitude (over all tokens and dimensions)."""


def massive_dimensions(model: ChatModel, texts: Sequence[Text], layer: int, times: float = TIMES) -> dict[int, float]:
    """Dimension -> its largest magnitude over the median, of those at the output of block `layer` that reach `times`; every token of the texts counts,
    the first too."""
    seen: list[torch.Tensor] = []

    def receive(at: int, h: torch.Tensor) -> None:
        if at == layer:
            seen.append(h[0].abs().double().cpu())

    with torch.inference_mode(), block_outputs(model.anatomy, receive):
        for t in texts:
            ids = encode_answer(model.tokenizer, t.question, t.answer, t.system).ids
            model.anatomy.body(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    magnitudes = torch.cat(seen)
    ratio = magnitudes.max(0).values / magnitudes.median()
    return {int(d): float(ratio[d]) for d in torch.nonzero(ratio >= times).flatten()}
