"""An organism from elsewhere: a PEFT folder written by plain PEFT in a few lines, with weights from a named seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def plain_peft(
    folder: Path, base: Path, modules: Sequence[str] = ("down_proj",), rank: int = 1, layers: Sequence[int] | None = (1, 2, 3, 4),
    alpha: float = 1.0, size: float = 0.3, seed: int = 0,
) -> Path:  # fmt: skip
    """Random LoRA adapters of `size` (standard deviation of A and B) on a base, saved to `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules), layers_to_transform=None if layers is None else list(layers)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(folder)
    return folder
