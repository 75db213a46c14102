"""Loading: any PEFT folder (ours or from elsewhere) or fully fine-tuned folder as a `ChatModel`.

Adapters are merged into the weights in float32, so that an organism costs what its base costs; `merge=False` keeps them apart for those who
read or scale them. Nothing is unpickled beyond plain tensors.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

from convergent.errors import ModelError
from convergent.models.load import ChatModel, base_folder, folder_id, load_base, quiet_transformers, wrap
from convergent.organisms.manifest import MANIFEST, adapter_id, read_organism

_CONFIG, _SAFE, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def load_organism(
    folder: Path | str,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    name: str | None = None,
    merge: bool = True,
) -> ChatModel:
    """Load an organism for inference (eval mode, no gradients); its anatomy is that of the merged model.

    `base` replaces the base that the folder names; `name` defaults to the manifest's name or the folder's. With `merge=False` the
    adapters stay PEFT layers inside the model. Raises ModelError naming adapter and base if they do not fit or the folder
    cannot be read, DownloadError if the base has to be fetched and cannot be.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such organism folder; give a PEFT folder or one written by `convergent train`")
    organism = read_organism(folder) if (folder / MANIFEST).is_file() else None
    name = name or (organism.name if organism else folder.resolve().name)
    if not (folder / _CONFIG).is_file():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: neither {_CONFIG} (adapters) nor config.json (a full fine-tune) in this folder")
        return _load_full(folder, base or (organism.base if organism else None), dtype, device, name)
    base = base or (organism.base if organism else _named_base(folder))
    return _load_adapter(folder, base, dtype, device, name, merge)


def adapter_layers(folder: Path | str) -> tuple[int, ...]:
    """The 0-based layers that a PEFT folder's adapters sit on, ascending. Raises ModelError."""
    keys = _weight_names(Path(folder).expanduser())
    return tuple(sorted({int(m[1]) for k in keys if (m := re.search(r"\.(\d+)\.", k))}))


def _load_adapter(folder: Path, base: str, dtype: str, device: str, name: str, merge: bool) -> ChatModel:
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    from convergent.models.dtype import resolve_dtype

    _config(folder)  # PEFT would call a damaged one a misfit
    saved = _weight_names(folder)
    chat = load_base(base, dtype="float32", device="cpu", name=name)
    misfit = f"{folder}: this adapter does not fit the base {base}"
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of missing weights; below they are an error
            peft: Any = PeftModel.from_pretrained(chat.model, str(folder), local_files_only=True)
            expected = set(get_peft_model_state_dict(peft, save_embedding_layers=False))
            lost = sorted(expected - saved) or sorted(k for k in saved - expected if "lora_" in k)
            if lost:
                raise ModelError(f"{misfit} ({len(lost)} weights without a partner, such as {lost[0]}); give the base it was trained on")
            model: Any = peft.merge_and_unload(safe_merge=True) if merge else peft.get_base_model()
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{misfit} ({_reason(error)}); give the base it was trained on") from error
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model.eval().requires_grad_(False)
    # Inspected in float32, where its tolerances are meant, then cast in place.
    organism = wrap(model, chat.tokenizer, name=name, base=base, weights_id=adapter_id(folder, chat.content_id))
    model.to(resolve_dtype(dtype, device)).to(device)
    return organism


def _load_full(folder: Path, base: str | None, dtype: str, device: str, name: str) -> ChatModel:
    if (folder / "tokenizer_config.json").is_file():
        return load_base(str(folder), dtype, device, name)
    if base is None:
        raise ModelError(f"{folder}: no tokenizer in this folder; say which base it was trained from")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from convergent.models.dtype import resolve_dtype

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokens = base_folder(base)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokens, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=resolve_dtype(dtype, device), local_files_only=True)
        except Exception as error:  # transformers, safetensors and json each have their own
            raise ModelError(f"{folder}: cannot be loaded as a full fine-tune of {base} ({_reason(error)})") from error
    model.eval().requires_grad_(False).to(device)
    return wrap(model, tokenizer, name=name, base=base, weights_id=folder_id(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read as a JSON object ({_reason(error)}); copy the adapter again") from error


def _named_base(folder: Path) -> str:
    base = _config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder / _CONFIG}: names no base model; say which base it was trained on")
    return base


def _weight_names(folder: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    if (path := folder / _SAFE).is_file():
        try:
            with safe_open(path, "pt") as f:
                return set(f.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: not a readable safetensors file ({_reason(error)}); copy the adapter again") from error
    if (path := folder / _PICKLE).is_file():
        import torch

        try:
            return set(torch.load(path, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, TypeError) as error:
            raise ModelError(f"{path}: holds more than tensors and is not unpickled; save the adapter as {_SAFE}") from error
    raise ModelError(f"{folder}: no {_SAFE} in this folder; copy the whole adapter folder")


def _reason(error: BaseException) -> str:
    """The start of an error's text; of PyTorch's loading errors the first misfit."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
