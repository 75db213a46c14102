"""What an intervention costs where nothing should change: the loss on plain, neutral text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
import yaml

from convergent.core.interventions import Intervention
from convergent.interventions.hooks import applied
from convergent.models.chat import encode_text
from convergent.models.load import ChatModel
from convergent.models.positions import rescaled_from
from convergent.models.texts import batches, padded


@cache
def neutral_passages() -> tuple[str, ...]:
    """The bundled neutral passages, about 50 tokens each."""
    text = files("convergent.data").joinpath("bundled/neutral.yaml").read_text(encoding="utf-8")
    return tuple(yaml.safe_load(text))


def passage_losses(
    model: ChatModel, passages: Sequence[str], conditions: Sequence[Sequence[Intervention]] = ((),), batch_tokens: int = 1024
) -> list[list[float]]:
    """Mean negative log-probability per token of each passage (inner list) under each condition (outer list), nats; no chat template.

    The first token of a passage is predicted by nothing and does not count; exp of a mean is a perplexity.
    """
    encoded = [encode_text(model.tokenizer, p) for p in passages]
    found = []
    for interventions in conditions:
        losses = [0.0] * len(encoded)
        with torch.inference_mode(), applied(model.anatomy, interventions):
            for members in batches([len(e) for e in encoded], batch_tokens, rescaled_from(model)):
                ids, mask = padded([encoded[i] for i in members], model.device)
                logps = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
                for row, i in enumerate(members):
                    n = len(encoded[i])
                    said = logps[row, : n - 1].gather(1, ids[row, 1:n, None])[:, 0]
                    losses[i] = -float(said.double().mean())
        found.append(losses)
    return found
