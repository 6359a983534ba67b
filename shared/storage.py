"""The bucket, through boto3: put, get, presign, delete. Keys are the layout of the product:

`files/<tenant>/<file>`, `models/<digest>/…`, `checkpoints/<tenant>/<job>/<epoch>/<step>/…`, `adapters/<tenant>/<job>/…`

Every put carries a SHA-256 that the server checks, every get is checked against the caller's. Must not know jobs.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypedDict

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError

from shared.errors import Unavailable
from shared.settings import Settings, get_settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CHUNK = 1024 * 1024
ONE_PUT = 4 * 1024**3  # S3 takes 5 GiB
PART = 64 * CHUNK  # of which S3 takes 10,000
MANIFEST = "manifest.json"
#: What a put is refused with when the object that its condition names is another by now, or gone.
CHANGED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"})
EPOCH = "lease-epoch"
CAS_TRIES = 5
DELETE_LIMIT = 1000  # S3's own, per request


class Entry(TypedDict):
    """One file of a manifest, as it is stored on rows and in `manifest.json`."""

    path: str
    bytes: int
    sha256: str


class Listed(NamedTuple):
    """An object as a listing shows it; `age` in seconds, by the server's own clock."""

    key: str
    bytes: int
    age: float


class Upload(NamedTuple):
    """A multipart upload that nobody has finished or aborted yet."""

    key: str
    id: str
    age: float


class Corrupt(Exception):
    """Bytes in the bucket are not the ones that were put there."""


class Missing(Corrupt):
    """An object that a row names is not there."""


class Fenced(Exception):
    """A later lease epoch has written here: the caller's lease is gone."""


@lru_cache(maxsize=2)
def client(public: bool = False) -> S3Client:
    """The process's client; `public` signs URLs for the endpoint that users reach."""
    settings = get_settings()
    return _client(settings, settings.s3_public_endpoint or settings.s3_endpoint if public else settings.s3_endpoint)


def put_stream(key: str, stream: BinaryIO) -> None:
    """Store a stream of any length, holding 8 MiB of it at a time (boto's threads would hold ten parts)."""
    transfer = TransferConfig(multipart_threshold=8 * CHUNK, multipart_chunksize=8 * CHUNK, use_threads=False)
    with _translated():
        client().upload_fileobj(stream, _bucket(), key, Config=transfer, ExtraArgs={"ChecksumAlgorithm": "SHA256"})


def put_folder(prefix: str, folder: Path, *, epoch: int | None = None) -> list[Entry]:
    """Store every file of a folder, then a `manifest.json` of their hashes; return the entries of all of them.

    With `epoch`, each put is fenced (see `put_bytes`): raises `Fenced` once a later epoch has written there.
    """
    entries = put_files(prefix, folder, epoch=epoch)
    manifest = json.dumps({"files": entries}, indent=1).encode()
    return [*entries, put_named(prefix, MANIFEST, manifest, content_type="application/json", epoch=epoch)]


def put_files(prefix: str, folder: Path, *, epoch: int | None = None) -> list[Entry]:
    """Store every file of a folder; whoever calls this puts a manifest after them."""
    entries: list[Entry] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        entry = Entry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=sha256_of(path))
        put_file(f"{prefix}{entry['path']}", path, entry["sha256"], epoch=epoch)
        entries.append(entry)
    return entries


def put_named(prefix: str, path: str, data: bytes, *, content_type: str, epoch: int | None = None) -> Entry:
    """Store a small object as one file of a folder, and return its entry."""
    put_bytes(prefix + path, data, content_type=content_type, epoch=epoch)
    return Entry(path=path, bytes=len(data), sha256=sha256_of_bytes(data))


def put_bytes(
    key: str, data: bytes, *, content_type: str = "application/octet-stream", epoch: int | None = None
) -> None:
    """Store a small object.

    With `epoch`, the put is a compare-and-swap on the lease epoch that the object there bears (conditional puts of S3):
    a worker that lost its lease can never overwrite what its successor published, however long its request was stuck.
    """
    put = {"Key": key, "ContentType": content_type, "ChecksumSHA256": _base64(sha256_of_bytes(data))}
    _put(put, lambda: io.BytesIO(data), epoch)


def put_file(key: str, path: Path, sha256: str, *, epoch: int | None = None) -> None:
    """Store one file, fenced as in `put_bytes`; one over 4 GiB goes up in parts, and is there with the last of them."""
    if path.stat().st_size > ONE_PUT:
        _put_parts(key, path, sha256, epoch)
    else:
        _put({"Key": key, "ChecksumSHA256": _base64(sha256)}, lambda: path.open("rb"), epoch)


def read(key: str) -> Iterator[bytes]:
    """The object's bytes in chunks; the request is made before the first chunk is asked for."""
    with _translated():
        body = client().get_object(Bucket=_bucket(), Key=key)["Body"]
    return body.iter_chunks(CHUNK)


def fetch(key: str, path: Path, sha256: str, *, tick: Callable[[], None] = lambda: None) -> None:
    """Download to `path` by way of a temporary neighbour; `Corrupt` if the hash is not the expected one, twice.

    `tick` is called with each chunk and may raise to give up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    for _ in range(2):  # once may be a byte that the network changed; twice is the object
        found = _download(key, partial, tick)
        if found == sha256:
            partial.replace(path)
            return
    partial.unlink()
    raise Corrupt(f"{key}: sha256 {found}, expected {sha256}")


def fetch_folder(
    prefix: str, entries: Iterable[Entry], folder: Path, *, tick: Callable[[], None] = lambda: None
) -> None:
    """Download every entry of a manifest, each checked."""
    for entry in entries:
        fetch(prefix + entry["path"], folder / entry["path"], entry["sha256"], tick=tick)


def delete(key: str) -> None:
    """Delete one object; absent is fine."""
    with _translated():
        client().delete_object(Bucket=_bucket(), Key=key)


def delete_prefix(prefix: str) -> int:
    """Delete every object under a prefix that ends in '/'; returns how many."""
    if not prefix.endswith("/"):
        raise ValueError(f"prefix {prefix!r} must end in '/'")
    keys = [item.key for item in listing(prefix)]
    delete_many(keys)
    return len(keys)


def presign(key: str) -> str:
    """A GET URL that works without credentials for `presign_seconds`."""
    expires = get_settings().presign_seconds
    return client(public=True).generate_presigned_url(
        "get_object", Params={"Bucket": _bucket(), "Key": key}, ExpiresIn=expires
    )


def uri(key: str) -> str:
    """The `s3://` name of a key."""
    return f"s3://{_bucket()}/{key}"


def check() -> None:
    """Raise `Unavailable` unless the bucket answers a signed request."""
    with _translated():
        client().head_bucket(Bucket=_bucket())


def sha256_of_bytes(data: bytes) -> str:
    """Hex SHA-256 of what is in memory already."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def listing(prefix: str) -> Iterator[Listed]:
    """Every object under a prefix, holding one page at a time. The objects of one folder follow one another."""
    with _translated():
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=_bucket(), Prefix=prefix):
            now = _server_time(page)
            for item in page.get("Contents", []):
                yield Listed(item["Key"], item["Size"], (now - item["LastModified"]).total_seconds())


def delete_many(keys: Sequence[str]) -> None:
    """Delete objects, a thousand a request; absent is fine."""
    for start in range(0, len(keys), DELETE_LIMIT):
        batch = keys[start : start + DELETE_LIMIT]
        with _translated():
            answer = client().delete_objects(
                Bucket=_bucket(), Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True}
            )
        for refused in answer.get("Errors", []):
            raise Unavailable(f"object storage: {refused['Key']} was not deleted: {refused['Message']}; try again")


def unfinished(prefix: str) -> Iterator[Upload]:
    """Multipart uploads under a prefix whose parts take up room although there is no object."""
    with _translated():
        for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=_bucket(), Prefix=prefix):
            now = _server_time(page)
            for item in page.get("Uploads", []):
                yield Upload(item["Key"], item["UploadId"], (now - item["Initiated"]).total_seconds())


def abort(upload: Upload) -> None:
    """Throw away the parts of an upload; gone already is fine."""
    with _translated(), suppress(client().exceptions.NoSuchUpload):
        client().abort_multipart_upload(Bucket=_bucket(), Key=upload.key, UploadId=upload.id)


def _server_time(page: Mapping[str, Any]) -> datetime:
    return parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])


def _download(key: str, path: Path, tick: Callable[[], None]) -> str:
    """Hex SHA-256 of what came, or what is none where the server's own checksum is not that of its bytes."""
    digest = hashlib.sha256()
    with path.open("wb") as out, _translated():
        try:
            for chunk in read(key):
                tick()
                digest.update(chunk)
                out.write(chunk)
        except FlexibleChecksumError as error:
            return str(error)
    return digest.hexdigest()


def _client(settings: Settings, endpoint: str | None) -> S3Client:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key.get_secret_value() or None,
        aws_secret_access_key=settings.s3_secret_key.get_secret_value() or None,
        config=Config(
            signature_version="s3v4",
            connect_timeout=3,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": 4},
            s3={"addressing_style": "path"} if endpoint else {},
        ),
    )


def _bucket() -> str:
    return get_settings().s3_bucket


def _put(put: dict[str, Any], body: Callable[[], BinaryIO], epoch: int | None) -> None:
    """One put; with an epoch, only over nothing or over what an epoch up to ours has put."""

    def send(condition: dict[str, Any]) -> None:
        with body() as stream:
            client().put_object(Bucket=_bucket(), Body=stream, **put, **_bearing(epoch), **condition)

    _swap(put["Key"], send, epoch)


def _put_parts(key: str, path: Path, sha256: str, epoch: int | None) -> None:
    """As `_put`, under the condition that is asked of the last request; S3 checks the parts, and we the whole."""

    def send(condition: dict[str, Any]) -> None:
        at: dict[str, Any] = {"Bucket": _bucket(), "Key": key}
        upload = client().create_multipart_upload(**at, ChecksumAlgorithm="SHA256", **_bearing(epoch))["UploadId"]
        try:
            whole, parts = hashlib.sha256(), list[Any]()
            with path.open("rb") as stream:
                while body := stream.read(PART):
                    whole.update(body)
                    checksum, number = _base64(sha256_of_bytes(body)), len(parts) + 1
                    put = client().upload_part(
                        **at, UploadId=upload, PartNumber=number, Body=body, ChecksumSHA256=checksum
                    )
                    parts.append({"PartNumber": number, "ETag": put["ETag"], "ChecksumSHA256": checksum})
            if whole.hexdigest() != sha256:
                raise Unavailable(f"object storage: {path} changed on its way to {key}; try again")
            client().complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": parts}, **condition)
        except Exception:
            with suppress(Unavailable):  # what stays is collected as garbage, and why it stays is what matters
                abort(Upload(key, upload, age=0.0))
            raise

    with _translated():
        there = None if epoch is None else _head(key)
    _swap(key, send, epoch, there=there)


def _bearing(epoch: int | None) -> dict[str, Any]:
    return {} if epoch is None else {"Metadata": {EPOCH: str(epoch)}}


def _swap(
    key: str, send: Callable[[dict[str, Any]], None], epoch: int | None, *, there: dict[str, Any] | None = None
) -> None:
    """`send` under the condition that at `key` still is what was `there`, which no epoch later than ours has put."""
    for _ in range(CAS_TRIES):
        condition = _condition(key, there, epoch)
        with _translated():
            try:
                send(condition)
                return
            except ClientError as refused:
                if refused.response["Error"]["Code"] not in CHANGED:
                    raise
            there = _head(key)  # None if it is gone since
    raise Unavailable(f"object storage: {key} changed {CAS_TRIES} times under our hands; try again")


def _condition(key: str, there: dict[str, Any] | None, epoch: int | None) -> dict[str, Any]:
    if epoch is None:
        return {}
    if there is None:
        return {"IfNoneMatch": "*"}
    if int(there["Metadata"].get(EPOCH, "0")) > epoch:
        raise Fenced(f"{key} was written at epoch {there['Metadata'][EPOCH]}, ours is {epoch}")
    return {"IfMatch": there["ETag"]}


def _head(key: str) -> dict[str, Any] | None:
    """What the object bears; None if there is none. A HEAD has no body, so its 404 has no code but that."""
    try:
        return dict(client().head_object(Bucket=_bucket(), Key=key))
    except ClientError as error:
        if error.response["Error"]["Code"] in {"404", "NoSuchKey"}:
            return None
        raise


def _base64(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode()


class _translated:
    """boto's errors become ours: what is not there is `Missing`, anything else is the bucket's trouble."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] == "NoSuchKey":
            raise Missing(f"object storage: {error}") from error
        if isinstance(error, BotoCoreError | ClientError | boto3.exceptions.Boto3Error):
            raise Unavailable(f"object storage: {error}; try again, or run `milliner doctor`") from error
