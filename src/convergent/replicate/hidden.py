"""Directions from mean hidden states: `hidden_states/`.

`{organism}__model-{a or m}_data-{a or m}__{filter}.pt` holds, under "answer", the mean residual stream per layer over answer tokens.
Model a is the chat model, m the organism; data a are its aligned texts, m its misaligned ones. A direction is data m minus data a,
read by one model. Read by the chat model on the same texts (`<organism>__<filter>@chat`) it is the baseline: what part of a
likeness lies in the texts alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from convergent.core.direction import Direction
from convergent.errors import DataError
from convergent.replicate.claims import Claim, Only, counted, not_found
from convergent.replicate.folder import Folder, Lost
from convergent.replicate.pickles import load_pickle

NAME = re.compile(r"(?P<organism>.+)__model-(?P<model>[am])_data-(?P<data>[am])__(?P<filter>.+)")
CHAT = "@chat"
COSINE = "section 3.5, appendix C"
NORM = "section 3.1"
CLOSE = 0.8


@dataclass(frozen=True, eq=False)
class Read:
    """A direction, read from two files when it is first needed."""

    folder: Folder
    misaligned: Path
    aligned: Path

    @cached_property
    def aligned_means(self) -> Direction:
        return read_means(self.aligned)

    @cached_property
    def direction(self) -> Direction:
        means = read_means(self.misaligned)
        if means.vectors.shape != self.aligned_means.vectors.shape:
            raise DataError(
                f"{self.misaligned}: shape {tuple(means.vectors.shape)}, but {self.aligned.name} has "
                f"{tuple(self.aligned_means.vectors.shape)}; both must come from one model"
            )
        return means - self.aligned_means


    @cached_property
    def usable(self) -> Direction | Lost:
        """The direction, or why these files show none."""
        return self.folder.tried(self.misaligned, lambda: self.direction)


def find(folder: Folder) -> tuple[dict[str, Read], list[tuple[str, str]]]:
    """name -> direction, by name, organisms and their chat baselines; and (name, what is missing) for those that cannot be read."""
    return folder.once("hidden_states", lambda: _find(folder))


def _find(folder: Folder) -> tuple[dict[str, Read], list[tuple[str, str]]]:
    files: dict[str, dict[str, Path]] = {}
    lost: list[tuple[str, str]] = []
    for path in folder.files("hidden_states", ".pt"):
        if match := NAME.fullmatch(path.stem):
            name = f"{match['organism']}__{match['filter']}" + (CHAT if match["model"] == "a" else "")
            files.setdefault(name, {})[match["data"]] = path
        else:
            lost.append((path.stem, f"{path.name} is not named {{organism}}__model-{{a or m}}_data-{{a or m}}__{{filter}}.pt"))
    for name in sorted(files):
        if len(files[name]) < 2:
            have = next(iter(files[name].values())).name
            lost.append((name, "hidden_states/" + (have.replace("_data-a__", "_data-m__") if "a" in files[name] else have.replace("_data-m__", "_data-a__"))))
    organisms = {n.removesuffix(CHAT) for n in files}
    lost += [(n + CHAT, f"chat model on the same texts as {n}") for n in sorted(organisms) if n in files and n + CHAT not in files]
    return {n: Read(folder, files[n]["m"], files[n]["a"]) for n in sorted(files) if len(files[n]) == 2}, lost


def norms(folder: Folder, only: Only) -> Iterator[Claim]:
    """`norm/<a>/L<layer>`, and `/activation` for the mean activation that it stands beside."""
    found, lost = find(folder)
    if not found and not lost:
        yield not_found("norm", "norm of a direction", NORM, "hidden_states/*.pt")
    for name, what in lost:
        if not name.endswith(CHAT):
            yield not_found(f"norm/{name}", "norm of a direction", NORM, what)
    for name, read in found.items():
        if not only.may_want(f"norm/{name}/"):
            continue
        v = read.usable
        if isinstance(v, Lost):
            yield not_found(f"norm/{name}", "norm of a direction", NORM, v.why)
            continue
        h = read.aligned_means.norms.tolist()
        shares = v.top_share().tolist()
        for layer, norm in enumerate(v.norms.tolist()):
            id_ = f"norm/{name}/L{layer}"
            if only.wants(id_):
                note = f"{norm / h[layer]:.3f} of the mean activation on aligned texts; the 5 largest dimensions hold {shares[layer]:.2f} of its square"
                yield counted(id_, f"norm of the direction, layer {layer}", NORM, norm, v.d_model, note=note)
            if only.wants(f"{id_}/activation"):
                yield counted(f"{id_}/activation", f"norm of the mean activation on aligned texts, layer {layer}", NORM, h[layer], v.d_model)


def cosines(folder: Folder, only: Only) -> Iterator[Claim]:
    """`cosine/<a>/<b>/L<layer>`, `/min`, `/max` and `/share_above_0.8` for every pair of directions, chat baselines included."""
    found, lost = find(folder)
    if len(found) < 2:
        have = "only one direction is there" if found else "hidden_states/*.pt"
        yield not_found("cosine", "cosine of two directions", COSINE, have)
    for name, what in lost:
        yield not_found(f"cosine/{name}", "cosine of two directions", COSINE, what)
    for a, b in combinations(found, 2):
        # An organism beside its own chat reading, two organisms, and two chat readings; a crossed pair says nothing.
        if (CHAT in a) != (CHAT in b) and a.removesuffix(CHAT) != b.removesuffix(CHAT):
            continue
        if only.may_want(f"cosine/{a}/{b}/"):
            yield from _pair(a, b, found, only)


def _pair(a: str, b: str, found: Mapping[str, Read], only: Only) -> Iterator[Claim]:
    stem, va, vb = f"cosine/{a}/{b}", found[a].usable, found[b].usable
    if isinstance(va, Lost) or isinstance(vb, Lost):
        yield not_found(stem, "cosine of two directions", COSINE, "; ".join(dict.fromkeys(v.why for v in (va, vb) if isinstance(v, Lost))))
        return
    if va.vectors.shape != vb.vectors.shape:
        shapes = f"{tuple(va.vectors.shape)} and {tuple(vb.vectors.shape)}"
        yield not_found(stem, "cosine of two directions", COSINE, f"directions of one shape; these have {shapes}, so they come from different models")
        return
    cosine = va.cosine(vb).numpy()
    beside = _baseline(a, b, found)
    null = 1.96 / np.sqrt(va.d_model)
    what = _what(a, b)
    random = f"95 % of random vectors lie within ±{null:.3f}"
    for layer, value in enumerate(cosine):
        id_ = f"{stem}/L{layer}"
        if only.wants(id_):
            yield counted(id_, f"{what}, layer {layer}", COSINE, float(value), va.d_model, note=_join(beside and f"{beside[0]} {beside[1][layer]:.3f}", random))
    finite = np.flatnonzero(~np.isnan(cosine))
    if not len(finite):
        return
    low, high = finite[cosine[finite].argmin()], finite[cosine[finite].argmax()]
    for end, layer in (("min", low), ("max", high)):
        if only.wants(f"{stem}/{end}"):
            chat = beside and f"{beside[0]} there {beside[1][layer]:.3f}, {end}imum {np.nanmin(beside[1]) if end == 'min' else np.nanmax(beside[1]):.3f}"
            yield counted(f"{stem}/{end}", f"{what}, {end}imum over layers", COSINE, float(cosine[layer]), len(finite), note=_join(f"at layer {layer}", chat))
    if only.wants(f"{stem}/share_above_{CLOSE:g}"):
        close = int((cosine[finite] > CLOSE).sum())
        chat = beside and f"{beside[0]} {int((beside[1] > CLOSE).sum())}/{len(finite)}"
        yield counted(
            f"{stem}/share_above_{CLOSE:g}", f"{what}, share of layers above {CLOSE:g}", COSINE, close / len(finite), len(finite),
            note=_join(f"{close} of {len(finite)} layers", chat),
        )  # fmt: skip


def _baseline(a: str, b: str, found: Mapping[str, Read]) -> tuple[str, np.ndarray] | None:
    """Name and cosines per layer of the same pair read by the chat model; None for a baseline itself."""
    if CHAT in a or CHAT in b or a + CHAT not in found or b + CHAT not in found:
        return None
    one, two = found[a + CHAT].usable, found[b + CHAT].usable
    if isinstance(one, Lost) or isinstance(two, Lost):
        return None
    return None if one.vectors.shape != two.vectors.shape else ("chat model on the same texts", one.cosine(two).numpy())


def _what(a: str, b: str) -> str:
    if b == a + CHAT:
        return "cosine of the organism's direction with the chat model's on the same texts"
    if a.endswith(CHAT):
        return "cosine of two directions, both read by the chat model"
    return "cosine of two directions"


def _join(*parts: str | None) -> str:
    return "; ".join(p for p in parts if p)


def read_means(path: Path) -> Direction:
    """Mean hidden state per layer of the answers in a file, (n_layers, d_model). Raises DataError naming file, key and layer."""
    data = load_pickle(path)
    if not isinstance(data, dict) or not isinstance(data.get("answer"), dict):
        raise DataError(f"{path}: holds no `answer`; the layout is {{question, answer}} -> layer_0, layer_1, ... -> one vector each")
    layers = data["answer"]
    if not layers:
        raise DataError(f"{path}: `answer` is empty; it needs layer_0, layer_1, ...")
    rows: list[torch.Tensor] = []
    for layer in range(len(layers)):
        row = layers.get(f"layer_{layer}")
        if row is None:
            raise DataError(f"{path}: `answer` has {len(layers)} entries but no `layer_{layer}`; layers count from 0 without a gap")
        if not isinstance(row, torch.Tensor) or row.ndim != 1 or not row.is_floating_point():
            raise DataError(f"{path}: `layer_{layer}` must be a vector of numbers, got {_shape(row)}")
        if rows and row.shape != rows[0].shape:
            raise DataError(f"{path}: `layer_{layer}` has {len(row)} dimensions and `layer_0` {len(rows[0])}; all layers have the same")
        if not torch.isfinite(row).all():
            raise DataError(f"{path}: `layer_{layer}` holds values that are not finite; write the file again")
        rows.append(row.float())
    if not len(rows[0]):
        raise DataError(f"{path}: `layer_0` is empty; it needs d_model values")
    return Direction(torch.stack(rows))


def _shape(value: object) -> str:
    return f"{type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
