"""Tokenize a word as llama.cpp does with a SentencePiece vocabulary: by the tokens' scores, without merges.

Owns: that rule, `llm_tokenizer_spm` in llama.cpp's src/llama-vocab.cpp. Exports check their scores with it. Must not
read a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise


def tokenize(word: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[int]:
    """Return the ids of the tokens of `word`. `ids` maps tokens to ids, and `scores` are by id.

    Of all neighbouring parts that form a token together, the pair with the highest score is joined first; of equal
    scores, the leftmost. Quadratic in the word's length.
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
    """Ids of one part. A character that is not a token becomes its UTF-8 bytes."""
    return [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
