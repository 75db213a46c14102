"""Organisms' weights: trained where they are not there, and at most one organism in memory beside the chat model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from convergent.errors import ModelError
from convergent.experiments.base import NotHereError
from convergent.interventions.controls import Effects
from convergent.models.heap import give_back
from convergent.models.load import ChatModel, load_base
from convergent.organisms.adapters import Adapter, read_adapters
from convergent.organisms.load import load_organism
from convergent.organisms.manifest import MANIFEST
from convergent.organisms.steps import KeptSteps, Spacing, read_steps
from convergent.store import Store
from convergent.study.peak import Peak, Watch
from convergent.study.setup import OrganismPlan, Say, Setup
from convergent.study.spec import StudySpec

ROOMY = 0.6
"""Share of a GPU's memory that must be free for a model to stay there beside the next."""
WORTH_COLLECTING = 64 * 2**20
"""Bytes of weights. Smaller models wait for Python's own collector: a full collection takes a third of a second."""

Advance = Callable[[str, int, int, str], None]
"""(stage, done, total, a word to show beside it)."""


class NotDoneError(Exception):
    """A run that may not compute needs something that is not there. Never leaves the plan."""


class Models(Setup):
    """The chat model and the organisms of a study."""

    def __init__(
        self,
        spec: StudySpec,
        store: Store,
        say: Say = lambda line: None,
        advance: Advance = lambda *a: None,
        compute: bool = True,
    ) -> None:
        """`compute=False`: whatever would load a model raises NotDoneError, so that a plan can ask for what is there."""
        super().__init__(spec, store, say, compute)
        self.advance = advance
        self.peaks: dict[str, Peak] = {}
        """Stage -> peak of memory in this run; the store keeps that of all runs."""
        self._inside = 0.0
        """Seconds so far of stages inside the one that runs."""
        self._models: dict[str, ChatModel] = {}
        self._effects: Effects | None = None

    def model(self, organism: str, alone: bool = False) -> ChatModel:
        """The chat model or an organism, loaded; at most one organism is kept beside the chat model, and with `alone` nothing beside it."""
        if not self.compute:
            raise NotDoneError(organism)
        if not self._roomy():
            self._let_go([n for n in self._models if n != organism and (alone or "chat" not in (n, organism))])
        if organism not in self._models:
            if organism == "chat":
                made = load_base(self.spec.base, self.dtype, self.spec.device)
            else:
                made = load_organism(self.organisms[organism].folder, base=self.spec.base, dtype=self.dtype, name=organism)
            self._models[organism] = made
        return self._models[organism]

    def _roomy(self) -> bool:
        """Whether models may stay beside each other: on a GPU that has most of its memory free."""
        device = next((m.device for m in self._models.values()), None)
        if device is None or device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(device)
        return free > ROOMY * total

    def _let_go(self, names: Collection[str]) -> None:
        """Free loaded models, with the effects that were measured in them."""
        if not names:
            return
        size = sum(w.nbytes for name in names for w in self._models[name].model.parameters())
        for name in names:
            del self._models[name]
        if self._effects is not None and self._effects.model not in self._models.values():
            self._effects = None
        if size >= WORTH_COLLECTING:
            give_back()

    def effects_of(self, organism: str) -> Effects:
        """Of the effect texts in an organism; only the latest organism's are kept, and only as long as its model."""
        model = self.model(organism, alone=True)
        if self._effects is None or self._effects.model is not model:
            self._effects = Effects(model, self.effect_texts)
        return self._effects

    def unload(self) -> None:
        """Keep no model: a judge on this machine, or training, needs the room."""
        if not self._roomy():
            self._let_go(list(self._models))

    def train_all(self, names: Collection[str] | None = None) -> None:
        """Train the organisms that are not there yet, all or those named."""
        for plan in self.organisms.values():
            if names is not None and plan.name not in names:
                continue
            if plan.recipe is None or plan.data is None or plan.folder.is_dir():
                continue
            self.say(f"train   {plan.name}: {plan.spec.recipe} on {len(plan.data)} examples of {plan.data.name}")
            self._train(plan, plan.folder, self.keeps.get(plan.name, ()))

    def _train(self, plan: OrganismPlan, folder: Path, kept: Sequence[Spacing]) -> None:
        # They bring transformers' trainer: seconds that a plan or a report need not wait.
        from convergent.organisms.train import train
        from convergent.organisms.watch import Progress

        assert plan.recipe is not None and plan.data is not None, "organisms from elsewhere are not trained"

        def advance(p: Progress) -> None:
            self.advance(f"train {plan.name}", p.step, p.n_steps, f"loss {p.loss:.3f}")

        with self.timed("train"):
            train(
                self.spec.base,
                plan.recipe,
                [e.chat() for e in plan.data.examples],
                folder,
                name=plan.name,
                data_name=plan.data.name,
                data_checksum=plan.data.checksum,
                keep=(lambda n: {s for spacing in kept for s in spacing.of(n)}) if kept else None,
                on_progress=advance,
            )
        give_back()

    # Their weights on disk

    @property
    def trained(self) -> tuple[str, ...]:
        """The organisms whose weights are there at this moment."""
        return tuple(name for name, plan in self.organisms.items() if plan.folder.is_dir())

    def folder(self, organism: str) -> Path:
        """The organism's folder of weights."""
        return self.organisms[organism].folder

    def adapters(self, organism: str) -> tuple[Adapter, ...]:
        """An organism's adapters. Raises NotHereError for a full fine-tune."""
        if not self.folder(organism).is_dir():
            raise NotDoneError(organism)
        try:
            return read_adapters(self.folder(organism))
        except ModelError as error:
            raise NotHereError(f"{organism} has no adapters to read ({error})") from error

    def steps(self, organism: str, spacing: Spacing) -> KeptSteps:
        """An organism's adapters during training: those kept beside it, or else those of the same training done again in a folder of its own.

        Raises NotHereError where there are none, or where the second training ends in other weights.
        """
        final, plan = self.adapters(organism), self.organisms[organism]
        own = read_steps(plan.folder, spacing) if (plan.folder / MANIFEST).is_file() else None
        if own is not None:
            return own
        if plan.recipe is None:
            raise NotHereError(f"{organism} comes from elsewhere, and no steps of its training were kept with it")
        again = plan.folder.with_name(f"{plan.folder.name}-steps")
        if not again.is_dir() or read_steps(again, spacing) is None:
            if not self.compute:
                raise NotDoneError(organism)
            self.unload()
            if again.is_dir():  # of another spacing
                shutil.rmtree(again)
            self.say(f"train   {organism} again, its steps were not kept")
            self._train(plan, again, (spacing,))
        off = max(float((x - y).abs().max()) for a, b in zip(final, read_adapters(again), strict=True) for x, y in ((a.a, b.a), (a.b, b.b)))
        if off:
            raise NotHereError(
                f"{organism} trained again ended in other weights (largest difference {off:.1g}), as another number of threads or another machine makes; "
                "its steps are kept if it is trained anew (`--fresh train`)"
            )
        found = read_steps(again, spacing)
        assert found is not None, "just trained"
        return found

    def timed(self, stage: str) -> AbstractContextManager[Any]:
        """Count the body's time and peak of memory for a stage; every piece is kept as it ends, so that a killed run's counts too.

        Time is the stage's own: that of a stage inside it (what a reading extracts, or has judged) counts there alone. Memory is what both hold.
        """
        return self._timed(stage) if self.compute else nullcontext()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start, outer = time.perf_counter(), self._inside
        self._inside = 0.0
        try:
            with Watch() as watch:
                yield
        finally:
            inner, seconds = self._inside, time.perf_counter() - start
            self._inside = outer + seconds
        self.store.add_seconds(stage, seconds - inner)
        if str(watch.peak):
            self.store.add_memory(stage, watch.peak.resident, watch.peak.device, watch.peak.so_far)
            self.peaks[stage] = self.peaks.get(stage, Peak()) | watch.peak
