"""Count everything that is asked for, in the order of the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from convergent.errors import DataError, InputError
from convergent.replicate import adapters
from convergent.replicate.claims import NOT_COMPARABLE, NOT_FOUND, Claim, Only
from convergent.replicate.folder import Folder
from convergent.replicate.published import all_published, elsewhere
from convergent.replicate.registry import FAMILIES, Options


def replicate(data: str | Path, only: str | None = None, options: Options | None = None, warn: Callable[[str], object] | None = None) -> list[Claim]:
    """The claims that the files in `data` can show, then those that cannot be counted, with what is missing.

    only: a glob over ids; what it leaves out is not computed.
    warn: told, in a line for each file, why it or a part of it could not be used; its other claims and all other files are counted.

    Raises DataError for a folder that is no such folder, for a pickle that is refused, and if files were unusable and nothing could
    be counted; InputError for a glob that matches nothing or an option out of range.
    """
    folder, asked, options = Folder(data), Only(only), options or Options()
    claims: list[Claim] = []
    for family in FAMILIES:
        if asked.may_want(f"{family.prefix}/"):
            claims += family.count(folder, asked, options)
    found = {c.id: c for c in claims if c.found and asked.wants(c.id)}
    # A family or a file that is missing is listed if anything of it was asked for.
    lost = {c.id: c for c in claims if not c.found and (asked.wants(c.id) or asked.may_want(f"{c.id}/"))}
    for c in _elsewhere(list(found), lost, asked):
        lost.setdefault(c.id, c)
    problems = folder.problems
    if problems and not found:
        raise DataError(problems[0] + (f" (and {len(problems) - 1} more such files)" if len(problems) > 1 else ""))
    if warn is not None:
        for line in problems:
            warn(line)
    if only is not None and not found and not lost:
        raise InputError(f"--only {only}: matches no claim; ids begin with {', '.join(f'{f.prefix}/' for f in FAMILIES)}, for example --only 'em/*'")
    return [*found.values(), *lost.values()]


def _elsewhere(found: list[str], lost: Mapping[str, Claim], asked: Only) -> list[Claim]:
    """Published figures that no file here can show."""
    pushed = {adapters.pushes(id_.split("/")[1]) for id_ in found if id_.startswith("adapter_steering/")}
    unusable = {adapters.pushes(id_.split("/")[1]): c for id_, c in lost.items() if id_.startswith("adapter_steering/")}
    rows = []
    for row in all_published():
        family, _, rest = row.id.partition("/")
        if family == "adapters":
            pushes, *_, share = rest.split("/")
            name, here = f"adapter_steering/{pushes}/{share}", pushes in pushed
            why = unusable[pushes].note.removeprefix(NOT_FOUND) if pushes in unusable else ""
        elif rest.startswith("released/"):
            name, why = row.id.replace("/released", ""), ""
            here = name in found  # a row with that id is there already, comparable or not
        else:
            name, here = row.id.replace("*", "_"), any(fnmatchcase(id_, row.id) for id_ in found)
            why = _why(name, lost)
        if row.claim and not here:  # a row without a claim is a detail of another one
            rows.append((name, row, why or "files that show it"))
    rows += [(row.id, row, f"public data; {row.note}") for row in elsewhere()]
    return [Claim(name, r.claim, r.source, r.value, None, 0, None, NOT_COMPARABLE, NOT_FOUND + what) for name, r, what in rows if asked.wants(name)]


def _why(name: str, lost: Mapping[str, Claim]) -> str:
    """What is missing for a claim, if that is known of its file."""
    parts = name.split("/")
    known = (lost.get("/".join(parts[:n])) for n in range(len(parts) - 1, 1, -1))
    return next((c.note.removeprefix(NOT_FOUND) for c in known if c is not None), "")
