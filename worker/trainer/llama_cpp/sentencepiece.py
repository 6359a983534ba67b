"""How llama.cpp reads a word by a SentencePiece vocabulary: it goes by the scores of tokens, and knows no merges.

Owns: that rule (`llm_tokenizer_spm` in its src/llama-vocab.cpp), by which scores are proven. Must not read a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise


def read(word: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[int]:
    """Of all neighbours that are a token together, those of the highest score are joined first, the leftmost of equals.

    Quadratic in the word's length.
    """
    parts = list(word)
    while True:
        joined = (left + right for left, right in pairwise(parts))
        found = [(scores[ids[token]], -i) for i, token in enumerate(joined) if token in ids]
        if not found:
            return [token for part in parts for token in _ids(part, ids)]
        i = -max(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _ids(part: str, ids: Mapping[str, int]) -> list[int]:
    """A letter that is no token is told by its bytes."""
    return [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
