"""Files through the official client: upload and download, and invalid rows reported by line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types import FileObject

from deploy.local.folder import Record


def test_a_file_is_uploaded_downloaded_and_deleted(client: openai.OpenAI, quotes: bytes) -> None:
    file = client.files.create(file=("q.jsonl", quotes), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(quotes), "q.jsonl", "fine-tune")
    assert extra(file)["sha256"] == hashlib.sha256(quotes).hexdigest()
    assert extra(file)["report"] == {"rows": 60, "bad_rows": 0, "format": "text", "problems": []}
    assert client.files.content(file.id).read() == quotes
    assert client.files.retrieve(file.id) == file
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert file.id not in [f.id for f in client.files.list()]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"text":"x"}\n' * 6 + b'{"text": oops}\n', "line 7: not JSON at column 10"),
        (b'{"messages":[{"role":"robot","content":"x"}]}', 'line 1: messages[0].role: found "robot"'),
        (b"", "line 1: the file is empty"),
        ('{"text":"Café"}'.encode("latin-1"), "is not UTF-8"),
        (os.urandom(4096), "bad row"),
        (b"text,id\nx,1\ny\n", "line 3: found 1 fields for 2 columns"),
        (b"PAR1" + os.urandom(4096), "line 1: the Parquet file is broken"),
        (b"PK\x03\x04", "line 1: the file is a ZIP archive or a spreadsheet (allowed: JSON lines"),
    ],
)
def test_an_invalid_file_is_kept_and_its_rows_are_reported(client: openai.OpenAI, body: bytes, message: str) -> None:
    file = client.files.create(file=("broken.jsonl", body), purpose="fine-tune")
    assert file.status == "error"
    assert message in (file.status_details or "")
    assert "allowed" in (file.status_details or "")
    problem = extra(file)["report"]["problems"][0]
    assert set(problem) == {"line", "field", "message", "hint"}


def test_csv_and_parquet_are_accepted(client: openai.OpenAI) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"instruction": ["Say it"] * 3, "output": ["hello"] * 3}), table)
    for name, body, form in (
        ("pairs.csv", 'prompt,completion\n"a\nb",c\nd,e\nf,g\n'.encode("utf-8-sig"), "completion"),
        ("alpaca.parquet", table.getvalue(), "chat"),
        ("misnamed.jsonl", b"text\nx\ny\nz\n", "text"),
    ):
        file = client.files.create(file=(name, body), purpose="fine-tune")
        assert file.status == "processed", file.status_details
        assert extra(file)["report"] == {"rows": 3, "bad_rows": 0, "format": form, "problems": []}
        assert client.files.content(file.id).read() == body


def test_pages_list_every_file_once(client: openai.OpenAI) -> None:
    row = b'{"text":"x"}'
    made = [client.files.create(file=(f"{i}.jsonl", row), purpose="fine-tune").id for i in range(5)]
    seen = [file.id for file in client.files.list(limit=2)]
    assert [file_id for file_id in seen if file_id in made] == made[::-1]
    assert len(seen) == len(set(seen))
    first = client.files.list(limit=2)
    assert (len(first.data), first.has_more) == (2, True)
    upwards = [file.id for file in client.files.list(limit=3, order="asc")]
    assert upwards == seen[::-1]


def test_an_unsupported_purpose_is_an_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="allowed for uploads: 'fine-tune'"):
        client.files.create(file=("a.jsonl", b"{}"), purpose="assistants")


def test_a_file_can_expire(client: openai.OpenAI) -> None:
    after: Any = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a.jsonl", b'{"text":"x"}'), purpose="fine-tune", expires_after=after)
    assert file.expires_at is not None
    assert abs(file.expires_at - time.time() - 3600) < 60


def test_a_file_in_use_cannot_be_deleted(client: openai.OpenAI, dataset: FileObject, paused: object) -> None:
    with pytest.raises(openai.ConflictError, match="still needs file") as refused:
        client.files.delete(dataset.id)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_an_upload_takes_constant_memory(client: openai.OpenAI, stack: Record, tmp_path: Path) -> None:
    """The peak memory of the API grows by less than 40 MB during an upload of 120 MB."""
    path = tmp_path / "big.jsonl"
    row = json.dumps({"text": "x" * 1000}) + "\n"
    with path.open("w") as out:
        for _ in range(120):
            out.write(row * 1000)
    before = peak_memory(stack)
    file = client.files.create(file=path, purpose="fine-tune")
    assert (file.status, extra(file)["report"]["rows"]) == ("processed", 120_000)
    assert peak_memory(stack) - before < 40e6
    client.files.delete(file.id)


def peak_memory(stack: Record) -> int:
    """The peak memory of the API process, in bytes."""
    status = Path(f"/proc/{stack.pids.api}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def extra(file: FileObject) -> dict[str, Any]:
    assert file.model_extra is not None
    return file.model_extra
