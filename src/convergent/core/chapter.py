"""What an experiment says in the report: text, charts and tables as plain values. The report draws them; the experiment knows no drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Role = Literal["real", "control", "baseline"]


@dataclass(frozen=True)
class Series:
    """One line, or one row of dots, of a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    """As many as `x`; nan leaves a gap."""
    role: Role = "real"
    low: Sequence[float] | None = None
    """Ends of the 95 % interval of each point, or None."""
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    """What is on the y axis, with its unit."""
    x_label: str
    series: tuple[Series, ...]
    null: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None
    """x, low, high of the band that chance leaves."""
    mark_x: float | None = None
    """A dashed upright line, as at the primary layer."""


@dataclass(frozen=True)
class Chart:
    """A figure of line panels."""

    id: str
    """Letters, digits and dashes; unique in its chapter."""
    title: str
    caption: str
    """Says n, what the interval is over, and what chance gives."""
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Grid:
    """A figure of coloured cells with their numbers: a matrix over two sets of names."""

    id: str
    title: str
    caption: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """rows x columns; nan is an empty cell."""
    digits: int = 2
    middle: float | None = 0.0
    """Where the two colours meet; None is one colour from the lowest to the highest value."""


@dataclass(frozen=True, eq=False)
class Sheet:
    """A table; also written beside the report as CSV and Parquet."""

    id: str
    title: str
    note: str
    """Denominators, units, what the intervals are over."""
    frame: pd.DataFrame
    """Column names are what the page prints, with units."""
    digits: int = 2


@dataclass(frozen=True, eq=False)
class Chapter:
    """One experiment's part of the report."""

    id: str
    """The experiment's name."""
    title: str
    method: Sequence[str]
    """Paragraphs: the question, what was done (formula), what the controls are."""
    figures: Sequence[Chart | Grid] = ()
    sheets: Sequence[Sheet] = ()
    notes: Sequence[str] = field(default=())
    """What could not be measured here and why, one sentence each."""
