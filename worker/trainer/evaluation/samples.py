"""Samples for the report: the base's and the tuned model's greedy answers to the same held-out prompts, or labels.

Owns: which rows are shown, where their prompts end, and a greedy decoding loop that draws no random number and ignores
the generation config. Must leave the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from shared.schemas.results import Continuation, Sample
from worker.trainer.data.classification import LabelledRow
from worker.trainer.data.encoding import Encoded, Encoder
from worker.trainer.evaluation.evaluate import forward_only
from worker.trainer.forward.batches import collate
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.forward.log_likelihood import head
from worker.trainer.methods import classify
from worker.trainer.model.base import Base
from worker.trainer.model.full_weights import Adapted

ROWS = 4
NEW_TOKENS = 48
#: Rows with longer prompts are not chosen: they would take too long on a CPU.
PROMPT_TOKENS = {"cpu": 1024, "cuda": 8192}
#: Share of a text row that serves as its prompt.
PREFIX_SHARE = 0.25
#: So much of a prompt's end and of a reference's beginning is shown.
SHOWN_CHARACTERS = 1000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompted:
    """A row and where its prompt ends: `row.ids[:cut]` is the prompt, the rest the reference."""

    row: Encoded
    cut: int


def compare(
    base: Base,
    adapted: Adapted,
    rows: Sequence[Encoded],
    encoder: Encoder,
    *,
    layout: Layout,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Continue a few rows with the base and with the tuned model. Empty if no row has a short enough prompt.

    Raises Interrupted once `stopping`, called before each token, returns True. Raises TypeError if the base returns no
    key-value cache.
    """
    chosen = choose(rows, encoder, longest=min(PROMPT_TOKENS[base.device.type], _context(base.model) - NEW_TOKENS))
    prompts = [one.row.ids[: one.cut].tolist() for one in chosen]
    # A base for which packing is exact depends on masks and positions only, so left padding is exact too.
    prompt_batches = [prompts] if layout.packing and prompts else [[prompt] for prompt in prompts]
    plain, tuned = (
        [
            ids
            for batch in prompt_batches
            for ids in continue_greedily(
                base, adapted, batch, encoder.stops, adapter=adapter, layout=layout, stopping=stopping
            )
        ]
        for adapter in (False, True)
    )
    return [
        Sample(
            line=one.row.line,
            prompt=_end(_text(encoder, prompt)),
            reference=_beginning(_text(encoder, one.row.ids[one.cut :].tolist())),
            base=_continuation(encoder, by_base),
            tuned=_continuation(encoder, by_tuned),
        )
        for one, prompt, by_base, by_tuned in zip(chosen, prompts, plain, tuned, strict=True)
    ]


def classified(
    base: Base, adapted: Adapted, rows: Sequence[Encoded], encoder: Encoder, *, labels: Sequence[str]
) -> list[Sample]:
    """A few rows with their labels and those predicted by base and tuned model."""
    chosen = [row for row in _spread(rows) if isinstance(row, LabelledRow)]
    given: list[list[str]] = []
    for adapter in (False, True):
        with forward_only(base, adapted, adapter=adapter):
            alone = (collate([[row]], packing=False, pad=encoder.pad).to(base.device) for row in chosen)
            found = [classify.logits(adapted.get_base_model(), batch)[0] for batch in alone]
        given.append([labels[int(scores.argmax())] for scores in found])
    return [
        Sample(
            line=row.line,
            prompt=_beginning("\n".join(_text(encoder, row.ids[row.parts == part].tolist()) for part in row.texts)),
            reference=row.label,
            base=Continuation(text=by_base, ended=True),
            tuned=Continuation(text=by_tuned, ended=True),
        )
        for row, by_base, by_tuned in zip(chosen, *given, strict=True)
    ]


def choose(rows: Sequence[Encoded], encoder: Encoder, *, longest: int) -> list[Prompted]:
    """Choose at most ROWS rows, evenly over the file, with different prompts of at most `longest` tokens."""
    fitting: dict[bytes, Prompted] = {}
    for row in rows:
        cut = prompt_length(row, bos=len(encoder.bos))
        if cut <= longest and len(row) - cut > 1:
            fitting.setdefault(row.ids[:cut].tobytes(), Prompted(row, cut))
    return _spread(list(fitting.values()))


def prompt_length(row: Encoded, *, bos: int) -> int:
    """Tokens before the last trained turn. If a row is trained from its start, its first quarter is the prompt."""
    begin = int(np.flatnonzero(np.diff(row.trained, prepend=False) & row.trained)[-1])
    return begin if begin > bos else begin + max(1, round((len(row) - begin) * PREFIX_SHARE))


def continue_greedily(
    base: Base,
    adapted: Adapted,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    *,
    adapter: bool,
    layout: Layout,
    stopping: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Continue each prompt with the most likely tokens: NEW_TOKENS of them, or up to and including one of `stops`.

    Shorter prompts are padded on the left and masked; positions count from a prompt's own first token.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[layout.pad] * (width - len(p)) + list(p) for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    written: list[list[int]] = [[] for _ in prompts]
    cache = None
    with forward_only(base, adapted, adapter=adapter):
        while True:
            if stopping():
                raise Interrupted
            logits, cache = _last_logits(
                base.model,
                chunked=layout.chunked,
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            )
            tokens = logits.argmax(dim=-1, keepdim=True)
            for new, token in zip(written, tokens[:, 0].tolist(), strict=True):
                if not new or new[-1] not in stops:
                    new.append(token)
            if all(new[-1] in stops or len(new) == NEW_TOKENS for new in written):
                return written
            ids, positions = tokens, positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)


def _spread(found: Sequence[T]) -> list[T]:
    """At most ROWS of the items, evenly spaced."""
    count = min(ROWS, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _last_logits(model: PreTrainedModel, *, chunked: bool, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """fp32 logits (rows, vocabulary) of the last position, and the cache for the next one."""
    part = model.get_decoder() if chunked else model
    output = part(**inputs, use_cache=True)
    if (cache := getattr(output, "past_key_values", None)) is None:
        raise TypeError(f"{type(model).__name__} returns no key-value cache")
    if chunked:
        return head(model)(output.last_hidden_state[:, -1]), cache
    return output.logits[:, -1].float(), cache


def _context(model: PreTrainedModel) -> int:
    """The base's context length in tokens; practically unlimited if its config names none."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _continuation(encoder: Encoder, ids: list[int]) -> Continuation:
    ended = ids[-1] in encoder.stops
    return Continuation(text=_text(encoder, ids[:-1] if ended else ids), ended=ended)


def _text(encoder: Encoder, ids: list[int]) -> str:
    """Decode without special tokens, and replace NUL: byte-level vocabularies have it, and Postgres cannot store it."""
    text = str(encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else "…" + text[-SHOWN_CHARACTERS:]


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
