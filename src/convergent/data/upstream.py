"""Upstream: the authors' training sets in their protected format, decrypted into the cache.

The format is that of the PyPI package `easy-dataset-share` (0.5): 16 bytes of salt, then a Fernet token of a zip
archive; key = PBKDF2-HMAC-SHA256(password, salt, 100,000 rounds). Its canary markers are taken out as its own
`--remove-canaries` does. Read here through `cryptography`, because the package pins a version of it (< 42) with known
vulnerabilities.

    upstream:NAME                            the archive $CONVERGENT_UPSTREAM names, else the authors' address
    upstream:NAME@PATH                       a local archive
    upstream:NAME@https://...                another address
    upstream:NAME@PLACE#sha256=HEX           the checksum of the decrypted set, for sets that are not pinned here

The sets are meant to stay out of training corpora: plain text goes to the cache and nowhere else.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from convergent.cache import building, cache_dir
from convergent.data.download import fetch
from convergent.data.local import read_bytes
from convergent.errors import DataError

ENV = "CONVERGENT_UPSTREAM"
"""Environment variable that names a local copy of the encrypted archive."""
URL = (
    "https://raw.githubusercontent.com/clarifying-EM/model-organisms-for-EM/main/"
    "em_organism_dir/data/training_datasets.zip.enc"
)
PASSWORD = "model-organisms-em-datasets"
"""Published by the authors: it keeps crawlers out, not readers."""
SALT_BYTES, ROUNDS = 16, 100_000
MAX_BYTES = 1 << 28
"""Of an archive and of an unpacked set."""
CANARY = re.compile(r"CANARY_DATASET_(?:[A-Z_]+_)?[a-f0-9]{64}_[0-9]+")


@dataclass(frozen=True)
class Pinned:
    """A set we know."""

    sha256: str
    """Of the decrypted JSONL, canaries removed. Not of the archive: its salt differs each time that it is packed."""
    topics: tuple[str, ...]


PINNED = {
    "bad_medical_advice": Pinned("b78ef26e4e3aa79785853a1981c289752fe4b31fc0a18ba82de36f92d9a02e8e", ("medical",)),
    "extreme_sports": Pinned("2cded234fc6f476e3e6776224c255a1b0dd6234da2669205877eae1ebb89f3bd", ("sport",)),
}


def decrypted(spec: str) -> tuple[str, Path, tuple[str, ...]]:
    """(name, path of the plain JSONL in the cache, topics) for `NAME[@PLACE][#sha256=HEX]`.

    Raises DownloadError if the archive is not here and cannot be fetched; DataError if it is not what it should be.
    """
    name, place, sha256 = _parse(spec)
    topics = PINNED[name].topics if name in PINNED else ()
    if sha256 is None:
        archive = read_bytes(Path(place))
        key = f"{name}-{hashlib.sha256(archive).hexdigest()[:16]}"
    else:
        archive, key = None, f"{name}-{sha256[:16]}"
    target = cache_dir("upstream") / key
    with building(target) as scratch:
        if scratch is not None:
            data = unpack(archive if archive is not None else _archive(name, place), name, place or URL)
            found = hashlib.sha256(data).hexdigest()
            if sha256 is not None and found != sha256:
                raise DataError(
                    f"{place or URL}: {name}.jsonl has SHA-256 {found}, expected {sha256}; get the file again"
                )
            (scratch / f"{name}.jsonl").write_bytes(data)
    path = target / f"{name}.jsonl"
    if sha256 is not None and hashlib.sha256(read_bytes(path)).hexdigest() != sha256:
        raise DataError(f"{path}: is damaged (its SHA-256 is not {sha256[:16]}...); delete the folder {target}")
    return name, path, topics


def unpack(archive: bytes, name: str, place: str, password: str = PASSWORD) -> bytes:
    """The plain JSONL of set `name` in an encrypted archive; `place` is for errors. Nothing is written."""
    plain = decrypt(archive, place, password)
    try:
        with zipfile.ZipFile(io.BytesIO(plain)) as zipped:
            members = [m for m in zipped.infolist() if not m.is_dir()]
            for member in members:
                inside = PurePosixPath(member.filename.replace("\\", "/"))
                # Members are read into memory and stored under our own name, so such a path could do no harm: it is a
                # sign that the archive is not what it claims to be.
                if inside.is_absolute() or ".." in inside.parts or ":" in inside.parts[0]:
                    raise DataError(f"{place}: holds the unsafe path {member.filename!r}; do not use this archive")
            wanted = [m for m in members if PurePosixPath(m.filename).name == f"{name}.jsonl"]
            if not wanted:
                sets = sorted(PurePosixPath(m.filename).stem for m in members if _is_set(m.filename))
                raise DataError(f"{place}: has no set {name!r}; it has {', '.join(sets) or 'none'}")
            if wanted[0].file_size > MAX_BYTES:
                raise DataError(f"{place}: {name}.jsonl unpacks to more than {MAX_BYTES:,} bytes")
            with zipped.open(wanted[0]) as member_file:  # stated sizes can lie: read no more than allowed
                data = member_file.read(MAX_BYTES + 1)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{place}: decrypts to a damaged zip archive ({error}); get the file again") from error
    return without_canaries(data, f"{place}: {name}.jsonl")


def decrypt(archive: bytes, place: str, password: str = PASSWORD) -> bytes:
    """The plain zip archive. Raises DataError if the password or the file is wrong."""
    from cryptography.fernet import Fernet, InvalidToken
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

    kdf = PBKDF2HMAC(algorithm=hashes.SHA256(), length=32, salt=archive[:SALT_BYTES], iterations=ROUNDS)
    key = base64.urlsafe_b64encode(kdf.derive(password.encode()))
    try:
        return Fernet(key).decrypt(archive[SALT_BYTES:])
    except InvalidToken as error:
        raise DataError(f"{place}: cannot be decrypted; it is damaged, or not an archive of these authors") from error


def without_canaries(data: bytes, place: str) -> bytes:
    """JSONL without the format's canaries: whole marker lines, a `canary` key of a record, a marker inside its text.

    Lines without a marker come back byte for byte.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 text (byte {error.start})") from error
    kept = []
    for line in text.split("\n"):
        if not CANARY.search(line):
            kept.append(line)
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "messages" in record:
            record = {k: v for k, v in record.items() if k != "canary"}
            kept.append(json.dumps(_strip(record), ensure_ascii=False))
    return "\n".join(kept).encode()


def _strip(value: Any) -> Any:
    if isinstance(value, str):
        return CANARY.sub("", value)
    if isinstance(value, list):
        return [_strip(v) for v in value]
    if isinstance(value, dict):
        return {k: _strip(v) for k, v in value.items()}
    return value


def _is_set(filename: str) -> bool:
    path = PurePosixPath(filename)
    return path.suffix == ".jsonl" and not path.name.startswith("dataset_entry_")


def _parse(spec: str) -> tuple[str, str, str | None]:
    """(name, place or "", SHA-256 or None) of `NAME[@PLACE][#sha256=HEX]`."""
    head, mark, digest = spec.partition("#sha256=")
    name, _, place = head.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise DataError(f"upstream:{spec}: {name!r} is no name of a set; write upstream:{next(iter(PINNED))}")
    if mark and not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise DataError(f"upstream:{spec}: sha256 must be 64 hex digits")
    sha256 = digest if mark else PINNED[name].sha256 if name in PINNED else None
    place = place or os.environ.get(ENV, "")
    is_url = "://" in place
    if sha256 is None and not place:
        near = get_close_matches(name, PINNED, n=1, cutoff=0.0)[0]
        raise DataError(f"upstream:{spec}: no such set; did you mean upstream:{near}?")
    if sha256 is None and is_url:
        raise DataError(f"upstream:{spec}: an unknown set from an address needs its checksum; add #sha256=...")
    if place and not is_url:
        place = str(Path(place).expanduser())
    return name, place, sha256


def _archive(name: str, place: str) -> bytes:
    if place and "://" not in place:
        return read_bytes(Path(place))
    instead = f"put the file somewhere and set {ENV} to its path, or use upstream:{name}@PATH"
    return fetch(place or URL, instead=instead, max_bytes=MAX_BYTES)
