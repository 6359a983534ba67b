"""A text with a label → the token ids that a classifier reads, by the tokenizer's own template.

Owns: how one or two texts are encoded and cut: as `tokenizer(text, pair, truncation=True)` does it, because that is how
a tuned classifier will be asked. Must not import torch, nor know about models or batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.datasets import formats
from worker.trainer.data.encoding import CannotEncode, Encoded, Encoder

#: In `Labelled.parts`: a token that the tokenizer's template writes.
TEMPLATE = -1


@dataclass(frozen=True, slots=True)
class LabelledRow(Encoded):
    """A row to be classified: no token of it is predicted, and all are read.

    `types` int8 (length,) are the token types that BERT parts the texts by; `parts` int8 (length,) says which of the
    texts a token is of, 0 or 1, or TEMPLATE.
    """

    label: str
    types: npt.NDArray[np.int8]
    parts: npt.NDArray[np.int8]

    @property
    def trained_tokens(self) -> int:
        return len(self.ids)

    @property
    def texts(self) -> range:
        """Which texts there are: the first, or both."""
        return range(int(self.parts.max()) + 1)

    @property
    def runs_together(self) -> bool:
        """Two texts with nothing between them, as some decoders' tokenizers leave them."""
        return bool(((self.parts[:-1] == 0) & (self.parts[1:] == 1)).any())

    @property
    def content(self) -> bytes:
        return b"\0".join((self.ids.tobytes(), self.types.tobytes(), self.label.encode()))

    def cut(self, length: int) -> LabelledRow:
        """At most `length` tokens: the template's stay, and the longer text loses its end, down to halves."""
        if len(self) <= length:
            return self
        texts = [np.flatnonzero(self.parts == part) for part in (0, 1)]
        room = max(0, length - int((self.parts == TEMPLATE).sum()))
        shorter, longer = sorted(texts, key=len)
        share = min(len(shorter), room // 2)
        stays = self.parts == TEMPLATE
        stays[shorter[:share]] = stays[longer[: room - share]] = True
        return LabelledRow(
            self.line, self.ids[stays], self.trained[stays], self.label, self.types[stays], self.parts[stays]
        )


def encode(encoder: Encoder, line: int, example: formats.LabelledExample) -> LabelledRow:
    """Raises CannotEncode for a text of which the tokenizer leaves nothing."""
    texts = (example.text,) if example.pair is None else (example.text, example.pair)
    found = encoder.tokenizer.backend_tokenizer.encode(*texts, add_special_tokens=True)
    parts = np.array([TEMPLATE if part is None else part for part in found.sequence_ids], dtype=np.int8)
    if not (parts == 0).any():
        raise CannotEncode("text", "the base's tokenizer leaves nothing of it", "a text with letters or digits")
    typed = "token_type_ids" in encoder.tokenizer.model_input_names
    types = np.array(found.type_ids, dtype=np.int8) if typed else np.zeros(len(parts), np.int8)
    ids = np.array(found.ids, dtype=np.int32)
    return LabelledRow(line, ids, np.zeros(len(ids), np.bool_), example.label, types, parts)
