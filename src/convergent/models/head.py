"""Whether a model's language-model head stands alone, so that it can be run on the tokens that matter and no others."""

from __future__ import annotations

import torch

from convergent.models.load import ChatModel


@torch.no_grad()
def head_is_plain(chat: ChatModel) -> bool:
    """Whether this model's logits are head(body(ids)) to the bit: false for families that cap or scale them."""
    anatomy, config = chat.anatomy, chat.model.config.get_text_config()
    # Small logits hide a soft cap, so its setting is looked up as well as its effect.
    if anatomy.head is None or getattr(config, "final_logit_softcapping", None):
        return False
    ids = torch.arange(1, 9, device=chat.device)[None]
    want = chat.model(input_ids=ids, use_cache=False).logits.float()
    return torch.equal(want, anatomy.head(anatomy.body(input_ids=ids, use_cache=False).last_hidden_state).float())
