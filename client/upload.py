"""Upload a dataset for one request, and delete it afterwards. Must not print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
from openai import OpenAI


@contextmanager
def uploaded(client: OpenAI, file: str) -> Iterator[str]:
    """The id of a file. `file` is that id, or a path that is uploaded and deleted again."""
    if file.startswith("file-") and not Path(file).exists():
        yield file
        return
    with Path(file).open("rb") as stream:
        file_id = client.files.create(file=stream, purpose="fine-tune").id
    try:
        yield file_id
    finally:
        with suppress(openai.APIError):  # a failed deletion must not hide another error
            client.files.delete(file_id)
