"""Where downloaded and converted things live, and how files are written so that a crash leaves none half done."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from convergent.errors import StoreError

ENV = "CONVERGENT_CACHE"
"""Environment variable that moves the cache; default: $XDG_CACHE_HOME/convergent or ~/.cache/convergent."""


def cache_dir(*parts: str) -> Path:
    """The cache folder, or a folder below it; made if absent."""
    base = os.environ.get(ENV) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "convergent")
    path = Path(base).expanduser().joinpath(*parts)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: cannot make the cache folder ({error.strerror}); set {ENV} to a writable one") from error
    return path


@contextmanager
def building(target: Path) -> Iterator[Path | None]:
    """Make a folder exactly once: yields a scratch folder to fill, or None if `target` is there already.

    Other processes wait on a lock. `target` appears whole, by a rename, when the body ends without an error.
    """
    if target.is_dir():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.is_dir():
            yield None
            return
        for stale in target.parent.glob(f".{glob.escape(target.name)}.*.making"):  # of a killed process: the lock is ours now
            shutil.rmtree(stale, ignore_errors=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.making")
        scratch.mkdir()
        try:
            yield scratch
            for path in scratch.rglob("*"):
                if path.is_file():
                    rights_of_folder(path)
            scratch.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def rights_of_folder(path: Path) -> None:
    """Let those read and write a file who may its folder: safetensors makes files that only their owner may read, which a lab cannot share."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.part")  # two processes may write the same file
    try:
        tmp.write_text(text, encoding="utf-8")
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
