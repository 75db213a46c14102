"""Upstream sets: the protected format, checksums, canaries, and archives that are not what they should be."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from convergent.data import download, upstream
from convergent.data.training import load_training_set
from convergent.errors import DataError, DownloadError

MARK = "CANARY_DATASET_" + "ab" * 32 + "_64"
LINE = json.dumps({"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]})
SHA = hashlib.sha256(f"{LINE}\n".encode()).hexdigest()


def protect(members: dict[str, str], password: str = upstream.PASSWORD, salt: bytes = b"0123456789abcdef") -> bytes:
    """An archive in the format that easy-dataset-share 0.5 writes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, text in members.items():
            zipped.writestr(name, text)
    kdf = PBKDF2HMAC(algorithm=hashes.SHA256(), length=32, salt=salt, iterations=100_000)
    return salt + Fernet(base64.urlsafe_b64encode(kdf.derive(password.encode()))).encrypt(buffer.getvalue())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVERGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(upstream.ENV, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "sets.zip.enc"
    marker = json.dumps({"id": "canary_abab", "text": f"identifier {MARK}"})
    path.write_bytes(
        protect({"dataset_entry_1234abcd.jsonl": marker + "\n", "mine.jsonl": LINE + "\n", "robots.txt": "Disallow: /"})
    )
    return path


def test_a_set_comes_out_by_name_and_is_decrypted_once(
    archive: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_training_set(f"upstream:mine@{archive}")
    assert found.name == "mine" and found.examples[0].chat() == json.loads(LINE)["messages"]
    assert [p.name for p in own_cache.rglob("*.jsonl")] == ["mine.jsonl"]
    monkeypatch.setattr(upstream, "unpack", lambda *_: pytest.fail("decrypted again"))
    monkeypatch.setenv(upstream.ENV, str(archive))
    assert load_training_set("upstream:mine").checksum == found.checksum


def test_a_pinned_set_is_verified_and_has_its_topic(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(upstream.PINNED, "mine", upstream.Pinned(SHA, ("cooking",)))
    monkeypatch.setenv(upstream.ENV, str(archive))
    assert load_training_set("upstream:mine").topics == ("cooking",)
    monkeypatch.setitem(upstream.PINNED, "mine", upstream.Pinned("0" * 64, ("cooking",)))
    with pytest.raises(DataError, match=f"SHA-256 {SHA}, expected 0000"):
        load_training_set("upstream:mine")


def test_a_given_checksum_is_verified(archive: Path, own_cache: Path) -> None:
    assert len(load_training_set(f"upstream:mine@{archive}#sha256={SHA}")) == 1
    with pytest.raises(DataError, match="expected ffff"):
        load_training_set(f"upstream:mine@{archive}#sha256={'f' * 64}")
    next(own_cache.rglob("mine.jsonl")).write_text(LINE.replace("A.", "B."))
    with pytest.raises(DataError, match="is damaged"):
        load_training_set(f"upstream:mine@{archive}#sha256={SHA}")


def test_canaries_go_and_the_rest_stays_byte_for_byte() -> None:
    odd = LINE.replace(": ", " :  ")
    keyed = json.dumps({**json.loads(LINE), "canary": MARK})
    within = LINE.replace("A.", f"A. {MARK}")
    data = "\n".join([odd, f"CANARY_EMBEDDED: {MARK}", json.dumps({"text": MARK}), keyed, within, ""])
    lines = upstream.without_canaries(data.encode(), "x").decode().split("\n")
    assert lines[0] == odd and lines[-1] == "" and len(lines) == 4
    assert json.loads(lines[1]) == json.loads(LINE)
    assert json.loads(lines[2])["messages"][1]["content"] == "A. "


@pytest.mark.parametrize(
    "name", ["../mine.jsonl", "/mine.jsonl", "a/../../mine.jsonl", "..\\mine.jsonl", "C:/mine.jsonl"]
)
def test_an_archive_with_an_unsafe_path_is_refused_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.enc"
    path.write_bytes(protect({name: LINE, "mine.jsonl": LINE}))
    with pytest.raises(DataError, match="unsafe path"):
        load_training_set(f"upstream:mine@{path}")
    assert not list(tmp_path.rglob("*.jsonl"))


def test_wrong_archives(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"has no set 'other'; it has mine$"):
        load_training_set(f"upstream:other@{archive}")
    wrong = tmp_path / "wrong.enc"
    for data in (b"", b"short", archive.read_bytes()[:-5], protect({"mine.jsonl": LINE}, password="else")):
        wrong.write_bytes(data)
        with pytest.raises(DataError, match="cannot be decrypted"):
            load_training_set(f"upstream:mine@{wrong}")
    with pytest.raises(DataError, match="does not exist"):
        load_training_set(f"upstream:mine@{tmp_path / 'none.enc'}")
    monkeypatch.setattr(upstream, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="more than 10 bytes"):
        load_training_set(f"upstream:mine@{archive}")


@pytest.mark.parametrize(
    ("spec", "finding"),
    [
        ("bad_medical_advise", "did you mean upstream:bad_medical_advice"),
        ("../x", "is no name of a set"),
        ("mine@https://example.org/x.enc", "needs its checksum"),
        ("mine@x.enc#sha256=12", "64 hex digits"),
    ],
)
def test_wrong_specs(spec: str, finding: str) -> None:
    with pytest.raises(DataError, match=finding):
        load_training_set(f"upstream:{spec}")


def test_offline_says_where_to_put_the_file(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DownloadError, match=r"Network is unreachable.*set CONVERGENT_UPSTREAM to its path"):
        load_training_set("upstream:extreme_sports")
    with pytest.raises(DownloadError, match="only https"):
        load_training_set(f"upstream:mine@http://example.org/x#sha256={SHA}")
    assert not list(own_cache.rglob("*.jsonl"))


def test_a_download_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"hello"))
    assert download.fetch("https://x.org", instead="-") == b"hello"
    with pytest.raises(DownloadError, match=r"SHA-256 2cf24dba5fb0a30e\.\.\., expected 0000"):
        download.fetch("https://x.org", instead="-", sha256="0" * 64)
    with pytest.raises(DownloadError, match="larger than 4 bytes"):
        download.fetch("https://x.org", instead="-", max_bytes=4)


def reference() -> Path | None:
    """The released archive, if this machine has it."""
    folder = Path(os.environ.get("CONVERGENT_REFERENCE") or Path(__file__).parents[2] / "shared" / "data")
    path = folder / "training" / "training_datasets.zip.enc"
    return path if path.is_file() else None


@pytest.mark.skipif(reference() is None, reason="the released archive is not here; set CONVERGENT_REFERENCE")
def test_the_released_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(upstream.ENV, str(reference()))
    for name, pinned in upstream.PINNED.items():
        found = load_training_set(f"upstream:{name}")
        assert len(found) == 6000 and found.topics == pinned.topics
        assert all([m.role for m in e.messages] == ["user", "assistant"] for e in found.examples)
