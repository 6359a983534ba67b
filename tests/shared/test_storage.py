"""Object storage on a real SeaweedFS: hashes are checked, manifests come last, no zombie overwrites an object."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

import httpx2 as httpx
import pytest

from deploy.local.folder import Record
from shared import settings, storage
from shared.errors import Unavailable


@pytest.fixture
def prefix(stack: Record, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new prefix in the stack's bucket, with this process's client configured for it."""
    for name, value in stack.s3.model_dump().items():
        monkeypatch.setenv(f"MILLINER_S3_{name.upper()}", value)
    settings.get_settings.cache_clear()
    storage.client.cache_clear()
    prefix = f"unit/{secrets.token_hex(4)}/"
    yield prefix
    storage.delete_prefix(prefix)
    settings.get_settings.cache_clear()
    storage.client.cache_clear()


def test_a_folder_is_uploaded_with_its_manifest_and_downloaded(prefix: str, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    (there / "sub").mkdir(parents=True)
    (there / "a.txt").write_text("hat")
    (there / "sub" / "b.bin").write_bytes(os.urandom(100_000))
    entries = storage.put_folder(prefix, there)
    assert [entry["path"] for entry in entries] == ["a.txt", "sub/b.bin", "manifest.json"]
    storage.fetch_folder(prefix, entries, back)
    assert (back / "sub" / "b.bin").read_bytes() == (there / "sub" / "b.bin").read_bytes()
    assert json.loads((back / "manifest.json").read_text()) == {"files": entries[:-1]}


def test_a_large_stream_is_uploaded_in_parts(prefix: str) -> None:
    body = os.urandom(20 * 1024 * 1024)
    storage.put_stream(prefix + "big", io.BytesIO(body))
    assert b"".join(storage.read(prefix + "big")) == body


def test_bytes_with_a_wrong_hash_are_neither_stored_nor_downloaded(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("hat")
    wrong = hashlib.sha256(b"cap").hexdigest()
    with pytest.raises(Unavailable, match="object storage"):
        storage.put_file(prefix + "x", path, wrong)
    storage.put_bytes(prefix + "x", b"hat")
    with pytest.raises(storage.Corrupt, match="expected"):
        storage.fetch(prefix + "x", tmp_path / "y", wrong)
    assert not (tmp_path / "y").exists()
    assert not (tmp_path / "y.partial").exists()


@pytest.mark.parametrize("limit", [storage.ONE_PUT, 0], ids=["in one put", "in parts"])
def test_a_zombie_cannot_overwrite_what_its_successor_published(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(storage, "ONE_PUT", limit)
    path = tmp_path / "adapter"
    for epoch in (1, 1, 3):
        path.write_text(f"of epoch {epoch}")
        storage.put_folder(prefix, tmp_path, epoch=epoch)
    path.write_text("of a zombie")
    with pytest.raises(storage.Fenced, match="epoch 3; this worker's epoch is 2"):
        storage.put_folder(prefix, tmp_path, epoch=2)
    assert b"".join(storage.read(prefix + "adapter")) == b"of epoch 3"
    assert not list(storage.unfinished(prefix))


def test_the_hash_of_a_whole_file_is_checked_when_it_is_uploaded_in_parts(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ONE_PUT", 0)
    monkeypatch.setattr(storage, "PART", 5 * storage.CHUNK)  # the least that S3 takes
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(11 * storage.CHUNK))
    with pytest.raises(Unavailable, match="changed during its upload"):
        storage.put_file(prefix + "model.gguf", path, "0" * 64, epoch=1)
    assert not [*storage.listing(prefix), *storage.unfinished(prefix)]
    storage.put_file(prefix + "model.gguf", path, storage.sha256_of(path), epoch=1)
    assert b"".join(storage.read(prefix + "model.gguf")) == path.read_bytes()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in parts"])
def test_a_delayed_put_is_refused_after_its_successor_has_written(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> None:
    """The zombie has read that it may overwrite epoch 1. Before its put arrives, epoch 3 writes."""
    late = tmp_path / "late"
    late.write_bytes(b"two")
    storage.put_bytes(prefix + "x", b"one", epoch=1)
    head: Callable[..., object] = storage.client().head_object
    calls = []

    def head_then_delay(**arguments: str) -> object:
        answer = head(**arguments)
        calls.append(arguments)
        if len(calls) == 1:
            storage.put_bytes(prefix + "x", b"three", epoch=3)
        return answer

    monkeypatch.setattr(storage.client(), "head_object", head_then_delay)
    monkeypatch.setattr(storage, "ONE_PUT", 3 if whole else 2)
    with pytest.raises(storage.Fenced):
        storage.put_file(prefix + "x", late, storage.sha256_of(late), epoch=2)
    assert b"".join(storage.read(prefix + "x")) == b"three"
    assert not list(storage.unfinished(prefix))


def test_a_presigned_url_needs_no_credentials_and_a_plain_one_is_refused(prefix: str) -> None:
    storage.put_bytes(prefix + "x", b"hat")
    url = storage.presign(prefix + "x")
    assert httpx.get(url).content == b"hat"
    assert httpx.get(url.split("?")[0]).status_code == 403


def test_delete_prefix_deletes_that_prefix_only(prefix: str) -> None:
    for key in ("a/1", "a/2", "ab"):
        storage.put_bytes(prefix + key, b"x")
    assert storage.delete_prefix(prefix + "a/") == 2
    assert b"".join(storage.read(prefix + "ab")) == b"x"
    with pytest.raises(ValueError, match="must end in '/'"):
        storage.delete_prefix(prefix + "a")


def test_a_listing_is_complete_and_ages_use_the_servers_clock(prefix: str) -> None:
    folders = ("a/", "a-b/", "a/b/", "ab/")
    keys = sorted(f"{prefix}{folder}{i}" for folder in folders for i in range(300))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(storage.put_bytes, data=b"hat"), keys))
    listed = list(storage.listing(prefix))
    assert sorted(item.key for item in listed) == keys
    assert {item.bytes for item in listed} == {3}
    assert all(0 <= item.age < 60 for item in listed)
    runs = [folder for folder, _ in groupby(listed, key=lambda item: item.key.removeprefix(prefix).partition("/")[0])]
    assert sorted(runs) == ["a", "a-b", "ab"]


def test_objects_are_deleted_a_thousand_at_a_time(prefix: str) -> None:
    there = [f"{prefix}{i}" for i in range(3)]
    for key in there:
        storage.put_bytes(key, b"x")
    storage.delete_many([there[0], *(f"{prefix}absent-{i}" for i in range(storage.DELETE_LIMIT)), there[1]])
    assert [item.key for item in storage.listing(prefix)] == there[2:]
    storage.delete_many([])


def test_an_unfinished_upload_is_listed_and_aborted(prefix: str, stack: Record) -> None:
    key = prefix + "big"
    storage.client().create_multipart_upload(Bucket=stack.s3.bucket, Key=key)
    (upload,) = storage.unfinished(prefix)
    assert upload.key == key
    assert 0 <= upload.age < 60
    storage.abort(upload)
    storage.abort(upload)
    assert not list(storage.unfinished(prefix))


def test_a_server_that_is_down_is_unavailable(stack: Record, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLINER_S3_ENDPOINT", "http://127.0.0.1:9")
    settings.get_settings.cache_clear()
    storage.client.cache_clear()
    with pytest.raises(Unavailable, match="object storage: "):
        storage.check()
    monkeypatch.setenv("MILLINER_S3_ENDPOINT", stack.s3.endpoint)
    settings.get_settings.cache_clear()
    storage.client.cache_clear()
