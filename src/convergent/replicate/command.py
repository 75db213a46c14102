"""What `convergent replicate` does: count, write the page, print."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from convergent.errors import InputError
from convergent.judging.kept import THRESHOLDS
from convergent.replicate.page import check_page, write_page
from convergent.replicate.probe import REPEATS
from convergent.replicate.registry import Options
from convergent.replicate.run import replicate
from convergent.replicate.table import print_claims


def replicate_command(
    data: Path,
    as_json: bool = False,
    only: str | None = None,
    out: Path | None = None,
    repeats: int = REPEATS,
    thresholds: Sequence[float] = (),
) -> None:
    """Print the claims as a table or as one JSON list, and a line on stderr for each file that could not be used; raises before any output."""
    if repeats < 1:
        raise InputError(f"--repeats {repeats}: must be 1 or more")
    if out is not None:
        check_page(out)
    claims = replicate(data, only, Options(tuple(thresholds) or THRESHOLDS, repeats), warn=lambda line: print(f"convergent: {line}", file=sys.stderr))
    if out is not None:
        words = ["convergent", "replicate", "--data", str(data), *(["--only", only] if only else []), "--repeats", str(repeats)]
        write_page(claims, out, shlex.join([*words, *(w for t in thresholds for w in ("--threshold", f"{t:g}"))]))
    if as_json:
        print(json.dumps([c.row() for c in claims], indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print_claims(claims, whole=only is not None)
        if out is not None:
            print(f"wrote {out}")
