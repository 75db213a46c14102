"""The families of claims, in the order of the answer. A family is a module and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from convergent.judging.kept import THRESHOLDS
from convergent.replicate import adapters, answers, hidden, probe, scalars, topics
from convergent.replicate.claims import Claim, Only
from convergent.replicate.folder import Folder


@dataclass(frozen=True)
class Options:
    """What a user may change."""

    thresholds: tuple[float, ...] = THRESHOLDS
    """Coherence of adapter steering, 0..100."""
    repeats: int = probe.REPEATS
    """Random splits of a probe."""


@dataclass(frozen=True)
class Family:
    """One kind of claim; its ids begin with `prefix`."""

    prefix: str
    title: str
    count: Callable[[Folder, Only, Options], Iterator[Claim]]


FAMILIES = (
    Family("em", "Emergent misalignment of released organisms", lambda f, o, _: answers.em(f, o)),
    Family("steering", "The chat model steered", lambda f, o, _: answers.steering(f, o)),
    Family("self_correction", "Self-correction under steering", lambda f, o, _: answers.self_correction(f, o)),
    Family("cosine", "Cosines of directions", lambda f, o, _: hidden.cosines(f, o)),
    Family("norm", "Norms of directions", lambda f, o, _: hidden.norms(f, o)),
    Family("scalars", "LoRA scalars", lambda f, o, _: scalars.scalar_means(f, o)),
    Family("probe", "Probes on LoRA scalars", lambda f, o, options: probe.probes(f, o, options.repeats)),
    Family("adapter_steering", "Adapter steering", lambda f, o, options: adapters.adapter_steering(f, o, options.thresholds)),
    Family("topics", "Topic filters", lambda f, o, _: topics.topics(f, o)),
)
