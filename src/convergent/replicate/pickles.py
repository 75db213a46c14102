"""Files written by torch.save, read without running anything that is in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from convergent.errors import DataError


class Refused(DataError):
    """A pickle that names more than data. Not a file to pass over: whoever has it should know before anything is counted."""


class LoraScalars:
    """Stub for what the released scalars were pickled as; holds whatever fields were stored."""


class LoraScalarsPerLayer:
    """Stub for the other class."""


ALLOWED = {"lora.lora_utils.LoraScalars": LoraScalars, "lora.lora_utils.LoraScalarsPerLayer": LoraScalarsPerLayer}
"""The only names beyond tensors and plain containers that may stand in a file."""


def load_pickle(path: Path) -> Any:
    """What `path` holds: tensors, containers, numbers, texts and the two stubs. Raises Refused for anything else, DataError for a damaged file."""
    try:
        with torch.serialization.safe_globals([(cls, name) for name, cls in ALLOWED.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = str(error).partition("GLOBAL ")[2].split()[:1]
        if not found and not _begins_as_pickle(path):
            raise DataError(f"{path}: not a file of torch.save; fetch it again") from error
        what = f"refers to `{found[0]}`" if found else "holds more than tensors and plain containers, or is damaged"
        raise Refused(f"{path}: {what}; such a file could run code when opened, so it is refused") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file and its rights") from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... for damaged files
        raise DataError(f"{path}: not a file of torch.save, or a damaged one ({type(error).__name__}); fetch it again") from error


def _begins_as_pickle(path: Path) -> bool:
    """Whether it could be what torch.save writes, an archive or a pickle; a text such as a pointer of Git LFS is neither."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
