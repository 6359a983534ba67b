"""Object storage (S3, through boto3): put, get, presign, list and delete. The keys in the bucket are:

`files/<tenant>/<file>`, `models/<digest>/…`, `checkpoints/<tenant>/<job>/<epoch>/<step>/…`, `adapters/<tenant>/<job>/…`

Owns: hashes and conditional writes. The server checks the SHA-256 of every put; a download is checked against the hash
that the caller expects. Must not know jobs.
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
#: Larger files are uploaded in parts. S3 accepts 5 GiB in one put.
ONE_PUT = 4 * 1024**3
#: S3 accepts 10,000 parts.
PART = 64 * CHUNK
MANIFEST = "manifest.json"
#: The error codes of a conditional put whose object has been changed or deleted meanwhile.
CHANGED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"})
#: The metadata field with the lease epoch of whoever wrote the object.
EPOCH = "lease-epoch"
CAS_TRIES = 5
#: S3's limit for one delete request.
DELETE_LIMIT = 1000


class Entry(TypedDict):
    """One file of a folder, as stored in database rows and in `manifest.json`. `path` is relative to the folder."""

    path: str
    bytes: int
    sha256: str


class Listed(NamedTuple):
    """An object in a listing; `age` is in seconds, by the server's clock."""

    key: str
    bytes: int
    age: float


class Upload(NamedTuple):
    """A multipart upload that is neither finished nor aborted; `age` is in seconds, by the server's clock."""

    key: str
    id: str
    age: float


class Corrupt(Exception):
    """The bytes of an object are not the ones that were stored."""


class Missing(Corrupt):
    """An object does not exist."""


class Fenced(Exception):
    """A later lease epoch has written this object: the caller has lost its lease."""


@lru_cache(maxsize=2)
def client(public: bool = False) -> S3Client:
    """Return this process's S3 client; with `public`, for the endpoint that users reach, to sign URLs."""
    settings = get_settings()
    return _client(settings, settings.s3_public_endpoint or settings.s3_endpoint if public else settings.s3_endpoint)


def put_stream(key: str, stream: BinaryIO) -> None:
    """Store a stream of any length, with 8 MiB of it in memory at a time (boto's threads would keep ten parts)."""
    transfer = TransferConfig(multipart_threshold=8 * CHUNK, multipart_chunksize=8 * CHUNK, use_threads=False)
    with _translate_errors():
        client().upload_fileobj(stream, _bucket(), key, Config=transfer, ExtraArgs={"ChecksumAlgorithm": "SHA256"})


def put_folder(prefix: str, folder: Path, *, epoch: int | None = None) -> list[Entry]:
    """Store every file of a folder, then a `manifest.json` with their hashes. Returns the entries of all of them.

    With `epoch`, each put is conditional (see `put_bytes`).
    """
    entries = put_files(prefix, folder, epoch=epoch)
    manifest = json.dumps({"files": entries}, indent=1).encode()
    return [*entries, put_named(prefix, MANIFEST, manifest, content_type="application/json", epoch=epoch)]


def put_files(prefix: str, folder: Path, *, epoch: int | None = None) -> list[Entry]:
    """Store every file of a folder without a manifest. The caller stores one afterwards."""
    entries: list[Entry] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        entry = Entry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=sha256_of(path))
        put_file(f"{prefix}{entry['path']}", path, entry["sha256"], epoch=epoch)
        entries.append(entry)
    return entries


def put_named(prefix: str, path: str, data: bytes, *, content_type: str, epoch: int | None = None) -> Entry:
    """Store `data` as one file of a folder, and return its entry."""
    put_bytes(prefix + path, data, content_type=content_type, epoch=epoch)
    return Entry(path=path, bytes=len(data), sha256=sha256_of_bytes(data))


def put_bytes(
    key: str, data: bytes, *, content_type: str = "application/octet-stream", epoch: int | None = None
) -> None:
    """Store a small object.

    With `epoch`, the put is a compare-and-swap on the lease epoch in the metadata of the object that is there (S3
    conditional puts). It raises Fenced if a later epoch has written the object. So a worker that lost its lease can
    never overwrite what its successor published, however long its request was delayed.
    """
    put = {"Key": key, "ContentType": content_type, "ChecksumSHA256": _base64(sha256_of_bytes(data))}
    _put(put, lambda: io.BytesIO(data), epoch)


def put_file(key: str, path: Path, sha256: str, *, epoch: int | None = None) -> None:
    """Store one file, with `epoch` as in `put_bytes`. Above 4 GiB it is sent in parts, and appears with the last."""
    if path.stat().st_size > ONE_PUT:
        _put_parts(key, path, sha256, epoch)
    else:
        _put({"Key": key, "ChecksumSHA256": _base64(sha256)}, lambda: path.open("rb"), epoch)


def read(key: str) -> Iterator[bytes]:
    """Return an object's bytes in chunks. The request is sent at once, not with the first chunk. Raises Missing."""
    with _translate_errors():
        body = client().get_object(Bucket=_bucket(), Key=key)["Body"]
    return body.iter_chunks(CHUNK)


def fetch(key: str, path: Path, sha256: str, *, tick: Callable[[], None] = lambda: None) -> None:
    """Download an object to `path`, by way of `path.partial`. Raises Missing, and Corrupt if its hash is wrong twice.

    `tick` is called for each chunk, and may raise to stop.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    for _ in range(2):  # the first time the network may have changed a byte; the second time it is the object
        found = _download(key, partial, tick)
        if found == sha256:
            partial.replace(path)
            return
    partial.unlink()
    raise Corrupt(f"{key}: sha256 {found}, expected {sha256}")


def fetch_folder(
    prefix: str, entries: Iterable[Entry], folder: Path, *, tick: Callable[[], None] = lambda: None
) -> None:
    """Download every entry of a folder with `fetch`, which checks its hash."""
    for entry in entries:
        fetch(prefix + entry["path"], folder / entry["path"], entry["sha256"], tick=tick)


def delete(key: str) -> None:
    """Delete one object, if it exists."""
    with _translate_errors():
        client().delete_object(Bucket=_bucket(), Key=key)


def delete_prefix(prefix: str) -> int:
    """Delete every object under a prefix, which must end in '/'. Returns how many."""
    if not prefix.endswith("/"):
        raise ValueError(f"prefix {prefix!r} must end in '/'")
    keys = [item.key for item in listing(prefix)]
    delete_many(keys)
    return len(keys)


def presign(key: str) -> str:
    """Return a download URL that works without credentials for `presign_seconds`."""
    expires = get_settings().presign_seconds
    return client(public=True).generate_presigned_url(
        "get_object", Params={"Bucket": _bucket(), "Key": key}, ExpiresIn=expires
    )


def uri(key: str) -> str:
    """Return the `s3://` URI of a key."""
    return f"s3://{_bucket()}/{key}"


def check() -> None:
    """Raise Unavailable unless the bucket answers a signed request."""
    with _translate_errors():
        client().head_bucket(Bucket=_bucket())


def sha256_of_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def listing(prefix: str) -> Iterator[Listed]:
    """Yield every object under a prefix, with one page in memory at a time. Objects of one folder are adjacent."""
    with _translate_errors():
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=_bucket(), Prefix=prefix):
            now = _server_time(page)
            for item in page.get("Contents", []):
                yield Listed(item["Key"], item["Size"], (now - item["LastModified"]).total_seconds())


def delete_many(keys: Sequence[str]) -> None:
    """Delete objects, a thousand per request. Objects that do not exist are ignored."""
    for start in range(0, len(keys), DELETE_LIMIT):
        batch = keys[start : start + DELETE_LIMIT]
        with _translate_errors():
            answer = client().delete_objects(
                Bucket=_bucket(), Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True}
            )
        for refused in answer.get("Errors", []):
            raise Unavailable(f"object storage: {refused['Key']} was not deleted: {refused['Message']}; try again")


def unfinished(prefix: str) -> Iterator[Upload]:
    """Yield the unfinished multipart uploads under a prefix. Their parts use space although there is no object yet."""
    with _translate_errors():
        for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=_bucket(), Prefix=prefix):
            now = _server_time(page)
            for item in page.get("Uploads", []):
                yield Upload(item["Key"], item["UploadId"], (now - item["Initiated"]).total_seconds())


def abort(upload: Upload) -> None:
    """Delete the parts of an unfinished upload, if it still exists."""
    with _translate_errors(), suppress(client().exceptions.NoSuchUpload):
        client().abort_multipart_upload(Bucket=_bucket(), Key=upload.key, UploadId=upload.id)


def _server_time(page: Mapping[str, Any]) -> datetime:
    return parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])


def _download(key: str, path: Path, tick: Callable[[], None]) -> str:
    """Download an object; return the hex SHA-256 of its bytes, or the error text if the server's checksum is wrong."""
    digest = hashlib.sha256()
    with path.open("wb") as out, _translate_errors():
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
    """Put an object. With `epoch`, only if there is no object, or one of this epoch or an earlier one."""

    def send(condition: dict[str, Any]) -> None:
        with body() as stream:
            client().put_object(Bucket=_bucket(), Body=stream, **put, **_epoch_metadata(epoch), **condition)

    _compare_and_swap(put["Key"], send, epoch)


def _put_parts(key: str, path: Path, sha256: str, epoch: int | None) -> None:
    """Like `_put`, in parts; the last request is conditional. S3 checks each part's hash, we check the whole file's."""

    def send(condition: dict[str, Any]) -> None:
        at: dict[str, Any] = {"Bucket": _bucket(), "Key": key}
        upload = client().create_multipart_upload(**at, ChecksumAlgorithm="SHA256", **_epoch_metadata(epoch))[
            "UploadId"
        ]
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
                raise Unavailable(f"object storage: {path} changed during its upload to {key}; try again")
            client().complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": parts}, **condition)
        except Exception:
            with suppress(Unavailable):  # the garbage collector deletes what is left; the first error matters
                abort(Upload(key, upload, age=0.0))
            raise

    with _translate_errors():
        current = None if epoch is None else _head(key)
    _compare_and_swap(key, send, epoch, current=current)


def _epoch_metadata(epoch: int | None) -> dict[str, Any]:
    return {} if epoch is None else {"Metadata": {EPOCH: str(epoch)}}


def _compare_and_swap(
    key: str, send: Callable[[dict[str, Any]], None], epoch: int | None, *, current: dict[str, Any] | None = None
) -> None:
    """Call `send` with the condition that the object at `key` is still `current`; read it again and retry if not.

    Raises Fenced if a later epoch than ours has written it.
    """
    for _ in range(CAS_TRIES):
        condition = _condition(key, current, epoch)
        with _translate_errors():
            try:
                send(condition)
                return
            except ClientError as refused:
                if refused.response["Error"]["Code"] not in CHANGED:
                    raise
            current = _head(key)  # None if it was deleted meanwhile
    raise Unavailable(f"object storage: {key} was changed by others {CAS_TRIES} times during this write; try again")


def _condition(key: str, current: dict[str, Any] | None, epoch: int | None) -> dict[str, Any]:
    """The S3 condition that the object is still `current`. Raises Fenced if a later epoch than ours has written it."""
    if epoch is None:
        return {}
    if current is None:
        return {"IfNoneMatch": "*"}
    if int(current["Metadata"].get(EPOCH, "0")) > epoch:
        raise Fenced(f"{key} was written at lease epoch {current['Metadata'][EPOCH]}; this worker's epoch is {epoch}")
    return {"IfMatch": current["ETag"]}


def _head(key: str) -> dict[str, Any] | None:
    """Return an object's headers; None if it does not exist. A HEAD response has no body, so its code is only 404."""
    try:
        return dict(client().head_object(Bucket=_bucket(), Key=key))
    except ClientError as error:
        if error.response["Error"]["Code"] in {"404", "NoSuchKey"}:
            return None
        raise


def _base64(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode()


class _translate_errors:
    """Turn boto's errors into ours: Missing for an object that does not exist, Unavailable for everything else."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] == "NoSuchKey":
            raise Missing(f"object storage: {error}") from error
        if isinstance(error, BotoCoreError | ClientError | boto3.exceptions.Boto3Error):
            raise Unavailable(f"object storage: {error}; try again, or run `milliner doctor`") from error
