"""Out of memory."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says that there is no more memory, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or (type(error) is RuntimeError and "allocate memory" in str(error))
