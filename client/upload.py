"""A dataset on the server for as long as a question about it lasts. Must not print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
from openai import OpenAI


@contextmanager
def lent(client: OpenAI, file: str) -> Iterator[str]:
    """The id of `file`: of one that lies there, or of a path, which is uploaded and deleted again."""
    if file.startswith("file-") and not Path(file).exists():
        yield file
        return
    with Path(file).open("rb") as stream:
        file_id = client.files.create(file=stream, purpose="fine-tune").id
    try:
        yield file_id
    finally:
        with suppress(openai.APIError):  # tidying up after an error must not hide it
            client.files.delete(file_id)
