"""One download: HTTPS only, bounded in size, checked. No network is an ordinary answer, not a surprise."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request

from convergent.errors import DownloadError

TIMEOUT_S = 60.0


def fetch(url: str, *, instead: str, sha256: str | None = None, max_bytes: int = 1 << 28) -> bytes:
    """The bytes at `url`.

    `instead` tells the user what to do by hand. Raises DownloadError if the address is not https, cannot be reached,
    gives more than `max_bytes`, or other bytes than `sha256` names.
    """
    if not url.startswith("https://"):
        raise DownloadError(f"{url}: only https addresses are fetched; {instead}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
            data: bytes = reply.read(max_bytes + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"{url}: cannot be fetched ({reason}); {instead}") from error
    if len(data) > max_bytes:
        raise DownloadError(f"{url}: is larger than {max_bytes:,} bytes; {instead}")
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise DownloadError(f"{url}: has SHA-256 {found[:16]}..., expected {sha256[:16]}...; {instead}")
    return data
