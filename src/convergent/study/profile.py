"""Where a run's time went, and the peak of memory: by stage, and how close sampling came to what the machine's matrix products allow."""

from __future__ import annotations

import time
from collections.abc import Iterator

from convergent.study.plan import line_tokens_per_second, speed_of
from convergent.study.run import Run


class Profile:
    """Begun before a run does anything; only what is done from then on counts."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.before = run.store.seconds()
        self.start = time.perf_counter()

    def lines(self) -> Iterator[str]:
        """A table as lines of text. Readings are under their experiment's name, without what they extract or have judged, which counts there."""
        whole = time.perf_counter() - self.start
        spent = {s: t - self.before.get(s, 0.0) for s, t in self.run.store.seconds().items()}
        spent = {s: t for s, t in sorted(spent.items(), key=lambda x: -x[1]) if t > 0}
        spent["rest (models, report)"] = max(0.0, whole - sum(spent.values()))
        peaks = self.run.peaks
        yield f"profile {whole:.1f} s{'; peaks of memory are of the whole process while the stage worked' if peaks else ''}"
        for stage, seconds in spent.items():
            yield f"  {stage:22s} {seconds:9.1f} s {seconds / whole:6.1%}{f'  peak {peaks[stage]}' if stage in peaks else ''}"
        tally = self.run.tally
        if tally.tokens and spent.get("sample"):
            speed, line = tally.tokens / spent["sample"], line_tokens_per_second(self.run, speed_of(self.run))
            yield (
                f"  sampling: {tally.answers} answers, {tally.tokens} tokens and {tally.prefilled} of prompts, {speed:.0f} tokens/s; one forward pass per "
                f"token at this machine's GEMM rate, and nothing else, would be {line:.0f}: {speed / line:.0%}"
            )
            if tally.halved:
                yield f"  sampling: memory did not suffice {tally.halved} time(s), so batches were halved; set sampling.rows lower"
            if tally.panels:
                yield (
                    f"  sampling: {tally.panels} time(s) that was a panel of rows that are decoded together: last bits, and now and then a token, may differ "
                    "from those of a run whose memory suffices"
                )
