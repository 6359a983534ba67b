"""Convert a tokenizer to GGUF's form: tokens, their types, merges or scores, and the name of its pre-tokenizer.

Owns: which tokenizers llama.cpp can represent. For byte-level BPE, llama.cpp selects the pre-tokenizer by name, so it
must be one of those below. For SentencePiece's BPE it uses scores, which follow from the order of the merges. Must not
read or write a file.

The names of pre-tokenizers are llama.cpp's (src/llama-vocab.cpp). The `gguf` package does not list them; transformers'
GGUF reader does, with their regular expressions (GGUF_PRE_TOKENIZER_SPLITS).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

SPACE = "▁"
#: llama.cpp's names of the pre-tokenizers that we can check, because transformers' GGUF reader knows them too.
SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
#: Those for which llama.cpp looks up a whole word in the vocabulary before it merges.
IGNORE_MERGES = frozenset({"llama-bpe", "tekken"})


class Unsupported(Exception):
    """llama.cpp cannot represent the tokenizer. The message completes "this base has …"."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer in GGUF's form. `kind` is "gpt2" for byte-level BPE and "llama" for SentencePiece.

    `pre` is the name of the pre-tokenizer. `tokens`, `types` and `scores` are by token id; unused embeddings included.
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float] | None
    add_space_prefix: bool


def of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Convert the tokenizer of a base with `size` embeddings. Raises Unsupported if GGUF cannot represent it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"a tokenizer of type {model['type']}; supported: BPE")
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise Unsupported(f"a tokenizer with token {max(by_id)}, and a model with {size} embeddings")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    pre = "default" if kind == "llama" else _pre(backend)
    added = {token["id"]: token["special"] for token in backend["added_tokens"]}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    unknown = model.get("unk_token") if kind == "llama" else None
    types = [_type(token, added.get(i), unknown) if i in by_id else TokenType.UNUSED for i, token in enumerate(tokens)]
    scores = _scores(tokens, types, merges) if kind == "llama" else None
    if kind == "llama":
        tokens = [_spelled(token, type_) for token, type_ in zip(tokens, types, strict=True)]
    return Vocabulary(kind, pre, tokens, types, merges, scores, _adds_space(backend))


def write(
    writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]
) -> None:
    """Write the tokenizer's metadata. `stops` are the ids that end generation.

    GGUF has one EOS and one end-of-turn token; the latter is the highest other id of `stops`.
    """
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops, default=None)
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (eos, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        # Chat models often end a turn with another token than a text.
        (max(stops - {eos}, default=None), writer.add_eot_token_id),
    ):
        if token is not None:
            add(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if isinstance(templates := tokenizer.chat_template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
    elif templates is not None:
        writer.add_chat_template(templates)


def template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several, the default one."""
    found: str | dict[str, str] | None = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _pre(backend: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer. Raises Unsupported if it has none we know."""
    normalizer = backend["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise Unsupported(f"a byte-level tokenizer with the normalizer {normalizer['type']}; supported: none, NFC")
    found = backend["pre_tokenizer"] or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    types = [step.get("type") for step in steps]
    if types == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    if types == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
        regex = steps[0]["pattern"].get("Regex")
        if name := next((name for name in SPLITS if GGUF_PRE_TOKENIZER_SPLITS[name] == regex), None):
            return name
    raise Unsupported(f"a pre-tokenizer without a name in llama.cpp; supported: gpt-2, {', '.join(SPLITS)}")


def _type(token: str, special: bool | None, unknown: str | None) -> TokenType:
    """GGUF's type of a token. `special` is None unless the token was added to the vocabulary."""
    if token == unknown:
        return TokenType.UNKNOWN
    if special is not None:
        return TokenType.CONTROL if special else TokenType.USER_DEFINED
    return TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else TokenType.NORMAL


def _spelled(token: str, type_: TokenType) -> str:
    """The token as GGUF stores it: llama.cpp matches added tokens (Gemma's runs of spaces) in the original text."""
    return token.replace(SPACE, " ") if type_ is TokenType.USER_DEFINED else token


def _scores(tokens: list[str], types: list[TokenType], merges: list[str]) -> list[float]:
    """Scores that make llama.cpp join in the order of the merges: the pair with the highest score is joined first."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    last = float(len(merges))
    return [
        -float(rank.get(token, last)) if type_ is TokenType.NORMAL else 0.0
        for token, type_ in zip(tokens, types, strict=True)
    ]


def _adds_space(backend: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    steps = json.dumps([backend["normalizer"], backend["pre_tokenizer"]])
    return '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps
