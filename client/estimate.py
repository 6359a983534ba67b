"""`milliner estimate`: the question as the API takes it, and the verdict as people read it.

Owns: sizes such as 24GB, and the table. Must not print.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from openai import OpenAI
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.show import duration, size
from client.upload import lent
from shared.errors import InvalidRequest
from shared.estimation.estimate import Estimate

_UNITS = {"": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_MEANINGS = {
    "weights": "the frozen base",
    "adapter": "LoRA, its gradient, AdamW's moments",
    "activations": "what the layers keep for backward",
    "head": "a chunk of logits",
    "dequantized": "one matrix at a time",
    "overhead": "the device's context, gaps between blocks",
}


def bytes_of(text: str) -> int:
    """24GB is 24e9, 24GiB is 24 x 2^30, a bare number is bytes. Raises InvalidRequest: neither."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match.group(2) not in _UNITS:
        raise InvalidRequest(f"a size of {text!r}; allowed: a number with GB, GiB, MB, MiB, or of bytes")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def ask(client: OpenAI, file: str | None, **question: Any) -> Estimate:
    """The server's answer. `file` is the id of one that lies there, or a path: that is uploaded and deleted again."""
    body = _given(question)
    with ExitStack() as undo:
        if file is not None:
            body["training_file"] = undo.enter_context(lent(client, file))
        return Estimate.model_validate(client.post("/fine_tuning/estimate", cast_to=object, body=body))


def verdict(item: Estimate) -> RenderableType:
    """Where the memory goes, whether it fits, how long it takes, and what was assumed."""
    counts = item.parameters
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory")
    table.add_column("at the peak", justify="right")
    table.add_column("", style="dim", overflow="fold")
    for part, meaning in _MEANINGS.items():
        table.add_row(part, size(getattr(item.memory, part)), meaning)
    if item.memory.correction:
        table.add_row("correction", _signed(item.memory.correction), "what earlier runs took beyond that, or less")
    table.add_row("total", Text(size(item.memory.total), style="bold"), _setting(item))
    lines = [Text(f"{counts.trained:,} of {counts.total + counts.trained:,} parameters trained")]
    if item.tokens is not None and item.seconds is not None:
        lines.append(Text(f"about {duration(item.seconds)} for {item.n_epochs} x {item.tokens:,} tokens"))
    return Group(table, *lines, _fit(item), *(Text(f"assumed: {words}", style="dim") for words in item.assumptions))


def _signed(number: int) -> str:
    return ("-" if number < 0 else "+") + size(abs(number))


def _fit(item: Estimate) -> Text:
    if item.fits is None or item.device_memory_bytes is None:
        return Text("say --device-memory 24GB to hear whether it fits")
    room = size(item.device_memory_bytes)
    if item.fits:
        return Text(f"fits into {room}", style="green")
    if item.change is None:
        least = f"no single change is enough; with all of them it takes {size(item.smallest)}"
        return Text(f"does not fit into {room}: {least}", style="red")
    value = str(item.change.value).lower()
    remedy = f"{item.change.param} = {value} would: {size(item.change.total)}"
    return Text.assemble((f"does not fit into {room}", "red"), f"; {remedy}")


def _setting(item: Estimate) -> str:
    rows = f"{item.micro_batch} x {item.max_length:,} tokens"
    return f"{item.quantization}, r {item.r}, {rows}{', checkpointed' if item.gradient_checkpointing else ''}"


def _given(question: Mapping[str, Any]) -> dict[str, Any]:
    """What was said; the rest is left to the server."""
    said = {key: _given(value) if isinstance(value, Mapping) else value for key, value in question.items()}
    return {key: value for key, value in said.items() if value is not None and value != {}}
