"""LoRA scalars of answer tokens: `scalars/`.

A `.pt` holds prompt -> `.scalars`: position -> `.layer_scalars`: adapter -> number. Parquet files with the same prompts say where each
answer begins, and may hold the significance of its tokens. Files belong together by their prompts, whatever they are called; a class
is called by what follows "scalars_" in the name of its `.pt`, or by the whole name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convergent.directions.probes import Tokens
from convergent.errors import DataError
from convergent.replicate.claims import Claim, Only, counted, not_found
from convergent.replicate.folder import Folder, Lost
from convergent.replicate.pickles import load_pickle
from convergent.stats import iid_mean
from convergent.tables import need_columns, read_table

if TYPE_CHECKING:
    import pandas as pd

SOURCE = "section 4.1"
PROMPT, FIRST, SIGNIFICANCE = "prompt", "prompt_answer_first_token_idx", "answer_kl_div_gradients"
NEEDED = (PROMPT, "question", FIRST)


class Classes(NamedTuple):
    """What the files of scalars hold."""

    found: dict[str, Tokens]
    """By name."""
    lost: dict[str, str]
    """Name -> what is missing, or why its files cannot be used."""
    unread: dict[str, str]
    """Name of a Parquet file that belongs to no class, as far as anyone can tell -> why it cannot be used."""


def classes(folder: Folder) -> Classes:
    """The classes of answers, read once."""
    return folder.once("scalars", lambda: _classes(folder))


def class_names(folder: Folder) -> dict[str, Path]:
    """name -> `.pt`, without opening any."""
    paths = folder.files("scalars", ".pt")
    short = [p.stem.rpartition("scalars_")[2] or p.stem for p in paths]
    twice = Counter(short)
    return dict(sorted((name if twice[name] == 1 else path.stem, path) for name, path in zip(short, paths, strict=True)))


def _classes(folder: Folder) -> Classes:
    tables: dict[Path, pd.DataFrame] = {}
    unread: dict[str, str] = {}
    for path in folder.files("scalars", ".parquet"):
        df = folder.tried(path, partial(read_table, path, (PROMPT,), scores=()))
        if isinstance(df, Lost):
            unread[path.name] = df.why
        else:
            tables[path] = df
    found, lost = {}, {}
    for name, path in class_names(folder).items():
        tokens = _class(folder, name, path, tables)
        if isinstance(tokens, Lost):
            lost[name] = tokens.why
        elif tokens is None:
            lost[name] = "; ".join([f"a Parquet file with the prompts of {path.name}", *unread.values()])
        else:
            found[name] = tokens
    return Classes(found, lost, unread)


def _class(folder: Folder, name: str, path: Path, tables: dict[Path, pd.DataFrame]) -> Tokens | Lost | None:
    """The tokens of a class from the first table that shows them, with significance if one does; None without any table of its prompts."""
    scalars = folder.tried(path, partial(_scalars, path))
    if isinstance(scalars, Lost):
        return scalars
    own = [table for table, df in tables.items() if 2 * sum(isinstance(p, str) and p in scalars for p in df[PROMPT]) > len(df)]
    ways = [(t, True) for t in own if SIGNIFICANCE in tables[t].columns] + [(t, False) for t in own]
    why: list[str] = []
    for table, significance in ways:
        tokens = folder.tried(table, partial(_tokens, name, path, scalars, table, tables[table], significance))
        if not isinstance(tokens, Lost):
            return replace(tokens, note="; ".join(t for t in (tokens.note, *why) if t))
        if tokens.why not in why:
            why.append(tokens.why)
    return Lost(why[0]) if why else None


def _scalars(path: Path) -> dict[Any, Any]:
    scalars = load_pickle(path)
    if not isinstance(scalars, dict) or not scalars:
        raise DataError(f"{path}: must hold prompt -> scalars, got {type(scalars).__name__ if scalars or not isinstance(scalars, dict) else 'nothing'}")
    return scalars


def _tokens(name: str, path: Path, scalars: dict[Any, Any], main: Path, df: pd.DataFrame, significance: bool) -> Tokens:
    need_columns(df, NEEDED, main)
    significant = df[SIGNIFICANCE].tolist() if significance else None
    columns: dict[str, str] = {}
    values: list[list[float]] = []
    response: list[int] = []
    question: list[str] = []
    weights: list[float] = []
    absent = 0
    for row, (prompt, asked, first) in enumerate(zip(df[PROMPT], df["question"], df[FIRST], strict=True)):
        if not isinstance(prompt, str):
            raise DataError(f"{main}: row {row + 1}, column `{PROMPT}`: must be text, got {type(prompt).__name__}")
        if prompt not in scalars:
            absent += 1
            continue
        place = f"{path}: prompt of row {row + 1} in {main.name}"
        tokens = _field(scalars[prompt], "scalars", place)
        n = len(tokens)
        start = _position(first)
        if start is None or not 0 <= start < n:
            raise DataError(f"{main}: row {row + 1}, column `{FIRST}`: {first} is no position in {n} tokens; mend it")
        for position in range(start, n):
            if position not in tokens:
                raise DataError(f"{place}: has {n} tokens but none at position {position}; positions count from 0 without a gap")
            layers = _field(tokens[position], "layer_scalars", place)
            columns = columns or _labels(layers, place)
            if layers.keys() != columns.keys():
                raise DataError(f"{place}: token {position} has other adapters than the first token; every token needs all of them")
            values.append([layers[key] for key in columns])
        response += [row] * (n - start)
        question += [str(asked)] * (n - start)
        if significant is not None:
            weights += _weights(significant[row], n - start, f"{main}: row {row + 1}, column `{SIGNIFICANCE}`")
    try:
        numbers = np.array(values, dtype=float).reshape(-1, len(columns))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: scalars must be numbers ({error})") from error
    if not np.isfinite(numbers).all():
        row, column = np.argwhere(~np.isfinite(numbers))[0]
        raise DataError(f"{path}: answer {response[row] + 1}, {list(columns.values())[column]}: a scalar is not finite; write the file again")
    order = np.argsort([int(re.sub(r"\D.*", "", label[1:])) for label in columns.values()], kind="stable")
    return Tokens(
        name, tuple(np.array(list(columns.values()))[order].tolist()), numbers[:, order], np.array(response), np.array(question, dtype=object),
        np.array(weights) if significant is not None else None, f"{absent} prompts without scalars left out" if absent else "",
    )  # fmt: skip


def _position(value: Any) -> int | None:
    """A whole number, also one that a missing neighbour made a float; None for anything else."""
    try:
        return int(value) if float(value).is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None


def _weights(values: Any, n: int, place: str) -> list[float]:
    """`n` numbers. Raises DataError."""
    try:
        found = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: must be a list of numbers ({error})") from error
    if found.shape != (n,):
        raise DataError(f"{place}: {found.size} values for {n} answer tokens; one each")
    weights: list[float] = found.tolist()
    return weights


def _field(value: Any, name: str, place: str) -> dict[Any, Any]:
    found = getattr(value, "__dict__", {}).get(name)
    if not isinstance(found, dict) or not found:
        raise DataError(f"{place}: holds no `{name}`; the layout is prompt -> scalars: position -> layer_scalars: adapter -> number")
    return found


def _labels(layers: dict[Any, Any], place: str) -> dict[str, str]:
    """adapter key -> "L15", or "L15.down_proj" where that layer has more than one."""
    found: dict[str, tuple[str, str]] = {}
    for key in layers:
        match = re.search(r"\blayers\.(\d+)\.(.*)", str(key))
        if not match:
            raise DataError(f"{place}: adapter `{str(key)[:60]}` names no layer; keys read ...layers.{{number}}.mlp.down_proj")
        found[key] = (f"L{match[1]}", match[2].rpartition(".")[2])
    twice = Counter(layer for layer, _ in found.values())
    return {key: layer if twice[layer] == 1 else f"{layer}.{module}" for key, (layer, module) in found.items()}


def scalar_means(folder: Folder, only: Only) -> Iterator[Claim]:
    """`scalars/<class>/L<layer>`: mean scalar over answer tokens."""
    names = class_names(folder)
    claim = "mean LoRA scalar over answer tokens"
    if not names:
        yield not_found("scalars", claim, SOURCE, "scalars/*.pt")
    if not any(only.may_want(f"scalars/{name}/") for name in names):
        return
    found, lost, unread = classes(folder)
    for name, what in (lost | unread).items():
        yield not_found(f"scalars/{name}", claim, SOURCE, what)
    for name, tokens in found.items():
        answers = np.unique(tokens.response)
        for column, adapter in enumerate(tokens.adapters):
            id_ = f"scalars/{name}/{adapter}"
            if not only.wants(id_):
                continue
            x = tokens.values[:, column]
            # A long answer weighs more in the mean over tokens, so the interval over answers belongs to another mean.
            means = iid_mean([x[tokens.response == a].mean() for a in answers])
            spread = f", 95 % {means.low:.3f} to {means.high:.3f} (t over answers)" if means.defined else ""
            note = f"standard deviation {x.std():.3f}; mean of {len(answers)} answers' means {means.estimate:.3f}{spread}"
            yield counted(id_, f"{claim}, {adapter}", SOURCE, float(x.mean()), len(x), note="; ".join(t for t in (note, tokens.note) if t))
