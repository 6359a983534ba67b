"""`milliner estimate`: ask the server, and show its answer.

Owns: the arguments, sizes such as 24GB, and the table. Must not print.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from openai import OpenAI
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.request import Body
from client.show import duration, size
from client.upload import uploaded
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
    "activations": "what the layers keep for the backward pass",
    "head": "a chunk of logits",
    "dequantized": "one matrix at a time",
    "overhead": "device context, fragmentation",
}


def bytes_of(text: str) -> int:
    """24GB is 24e9, 24GiB is 24 x 2^30, a bare number is bytes. Raises InvalidRequest: any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match.group(2) not in _UNITS:
        raise InvalidRequest(f"found size {text!r}; allowed: a number with GB, GiB, MB or MiB, or a number of bytes")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def read_arguments(words: Sequence[str], *, model_given: bool) -> tuple[str | None, str | None]:
    """The model and the file of `estimate [FILE]` beside --model, or of the older `estimate MODEL [FILE]`.

    Raises InvalidRequest: a file without a model, or too many words.
    """
    if len(words) > (1 if model_given else 2):
        raise InvalidRequest(f"found {len(words)} arguments: {' '.join(words)}; allowed: --model MODEL and one FILE")
    first, second = (*words, None, None)[:2]
    if model_given:
        return None, first
    if first is not None and second is None and (first.startswith("file-") or Path(first).is_file()):
        raise InvalidRequest(f"no model is given for {first}; name one with --model; see: milliner models")
    return first, second


def ask(client: OpenAI, body: Body) -> Estimate:
    """The server's answer. `training_file` is an id, or a path that is uploaded and deleted again."""
    with ExitStack() as undo:
        if file := body.get("training_file"):
            body = body | {"training_file": undo.enter_context(uploaded(client, file))}
        return Estimate.model_validate(client.post("/fine_tuning/estimate", cast_to=object, body=body))


def verdict(item: Estimate) -> RenderableType:
    """A table of the memory, whether it fits, how long it takes, and what was assumed."""
    counts = item.parameters
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory")
    table.add_column("at the peak", justify="right")
    table.add_column("", style="dim", overflow="fold")
    for part, meaning in _MEANINGS.items():
        table.add_row(part, size(getattr(item.memory, part)), meaning)
    if item.memory.correction:
        table.add_row("correction", _signed(item.memory.correction), "measured minus computed in earlier runs")
    table.add_row("total", Text(size(item.memory.total), style="bold"), _setting(item))
    lines = [Text(f"{counts.trained:,} of {counts.total + counts.trained:,} parameters trained")]
    if item.tokens is not None and item.seconds is not None:
        lines.append(Text(f"about {duration(item.seconds)} for {item.n_epochs} x {item.tokens:,} tokens"))
    return Group(table, *lines, _fit(item), *(Text(f"assumed: {words}", style="dim") for words in item.assumptions))


def _signed(number: int) -> str:
    return ("-" if number < 0 else "+") + size(abs(number))


def _fit(item: Estimate) -> Text:
    if item.fits is None or item.device_memory_bytes is None:
        return Text("add --device-memory 24GB to check whether it fits")
    room = size(item.device_memory_bytes)
    if item.fits:
        return Text(f"fits into {room}", style="green")
    if item.change is None:
        least = f"no single change is enough; with all of them it needs {size(item.smallest)}"
        return Text(f"does not fit into {room}: {least}", style="red")
    value = str(item.change.value).lower()
    remedy = f"it fits with --set {item.change.param}={value}: {size(item.change.total)}"
    return Text.assemble((f"does not fit into {room}", "red"), f"; {remedy}")


def _setting(item: Estimate) -> str:
    rows = f"{item.micro_batch} x {item.max_length:,} tokens"
    return f"{item.quantization}, r {item.r}, {rows}{', checkpointed' if item.gradient_checkpointing else ''}"
