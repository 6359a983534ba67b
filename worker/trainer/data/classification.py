"""Encode a text, or a pair of texts, with its label for classification.

Owns: encoding and truncation. Both follow `tokenizer(text, pair, truncation=True)`, because a tuned classifier will be
called that way. Must not import torch, nor know about models or batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.datasets import formats
from worker.trainer.data.encoding import CannotEncode, Encoded, Encoder

#: In `LabelledRow.parts`: a token that the tokenizer's template adds.
TEMPLATE = -1


@dataclass(frozen=True, slots=True)
class LabelledRow(Encoded):
    """A row for classification: the model reads all tokens and predicts none.

    `types` int8 (length,) are BERT's token type ids. `parts` int8 (length,) is the text that each token is part of, 0
    or 1, or TEMPLATE.
    """

    label: str
    types: npt.NDArray[np.int8]
    parts: npt.NDArray[np.int8]

    @property
    def trained_tokens(self) -> int:
        return len(self.ids)

    @property
    def texts(self) -> range:
        """Numbers of the texts in this row: 0, or 0 and 1."""
        return range(int(self.parts.max()) + 1)

    @property
    def lacks_separator(self) -> bool:
        """Whether the tokenizer puts nothing between the two texts, as those of some decoders do."""
        return bool(((self.parts[:-1] == 0) & (self.parts[1:] == 1)).any())

    @property
    def content(self) -> bytes:
        return b"\0".join((self.ids.tobytes(), self.types.tobytes(), self.label.encode()))

    def cut(self, length: int) -> LabelledRow:
        """Cut to at most `length` tokens: keep the template's, and cut the longer text first, down to half the room."""
        if len(self) <= length:
            return self
        texts = [np.flatnonzero(self.parts == part) for part in (0, 1)]
        room = max(0, length - int((self.parts == TEMPLATE).sum()))
        shorter, longer = sorted(texts, key=len)
        share = min(len(shorter), room // 2)
        kept = self.parts == TEMPLATE
        kept[shorter[:share]] = kept[longer[: room - share]] = True
        return LabelledRow(
            self.line, self.ids[kept], self.trained[kept], self.label, self.types[kept], self.parts[kept]
        )


def encode(encoder: Encoder, line: int, example: formats.LabelledExample) -> LabelledRow:
    """Encode one example. Raises CannotEncode if the tokenizer makes no token of the first text."""
    texts = (example.text,) if example.pair is None else (example.text, example.pair)
    found = encoder.tokenizer.backend_tokenizer.encode(*texts, add_special_tokens=True)
    parts = np.array([TEMPLATE if part is None else part for part in found.sequence_ids], dtype=np.int8)
    if not (parts == 0).any():
        raise CannotEncode("text", "the base's tokenizer makes no token of it", "a text with letters or digits")
    typed = "token_type_ids" in encoder.tokenizer.model_input_names
    types = np.array(found.type_ids, dtype=np.int8) if typed else np.zeros(len(parts), np.int8)
    ids = np.array(found.ids, dtype=np.int32)
    return LabelledRow(line, ids, np.zeros(len(ids), np.bool_), example.label, types, parts)
