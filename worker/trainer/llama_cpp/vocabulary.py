"""A tokenizer in GGUF's words: its tokens, what kind each is, its merges, and how text is cut before them.

Owns: which tokenizers llama.cpp can be told of. Byte-level BPE goes by the name of its pre-tokenizer, which must be one
that we know; SentencePiece's BPE by scores, which follow from the order of its merges. Must not read or write a file.
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
#: llama.cpp's names of the ways to cut text that we can prove: by transformers' own reader, which knows these.
SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
#: Those of them whose vocabulary is looked up whole before any merge.
IGNORE_MERGES = frozenset({"llama-bpe", "tekken"})


class Unsupported(Exception):
    """What llama.cpp cannot be told of."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`kind` is "gpt2" for byte-level BPE, "llama" for SentencePiece. Lists are by token id, the padding included."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float] | None
    add_space_prefix: bool


def of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a base with `size` embeddings. Raises Unsupported, saying what cannot be written."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"a tokenizer of type {model['type']}; BPE is known")
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise Unsupported(f"token {max(by_id)} of a base with {size} embeddings")
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
    """The tokenizer's share of a model's metadata. `stops` are the tokens that end a generation."""
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
        # A chat's turn often ends by another token than a text does.
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
    """The chat template; of several, the one for conversations without tools."""
    found: str | dict[str, str] | None = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _pre(backend: dict[str, Any]) -> str:
    """llama.cpp's name of how this byte-level tokenizer cuts text. Raises Unsupported."""
    normalizer = backend["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise Unsupported(f"a byte-level tokenizer that normalizes by {normalizer['type']}")
    found = backend["pre_tokenizer"] or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    types = [step.get("type") for step in steps]
    if types == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    if types == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
        regex = steps[0]["pattern"].get("Regex")
        if name := next((name for name in SPLITS if GGUF_PRE_TOKENIZER_SPLITS[name] == regex), None):
            return name
    raise Unsupported(f"a tokenizer that cuts text in a way of its own; known are gpt-2, {', '.join(SPLITS)}")


def _type(token: str, special: bool | None, unknown: str | None) -> TokenType:
    """`special` is None of a token that was not added to the vocabulary."""
    if token == unknown:
        return TokenType.UNKNOWN
    if special is not None:
        return TokenType.CONTROL if special else TokenType.USER_DEFINED
    return TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else TokenType.NORMAL


def _spelled(token: str, type_: TokenType) -> str:
    """llama.cpp looks for what was added by hand (Gemma's runs of spaces) in the text as it came."""
    return token.replace(SPACE, " ") if type_ is TokenType.USER_DEFINED else token


def _scores(tokens: list[str], types: list[TokenType], merges: list[str]) -> list[float]:
    """llama.cpp joins first the pair whose token scores highest; here, what is merged first."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    last = float(len(merges))
    return [
        -float(rank.get(token, last)) if type_ is TokenType.NORMAL else 0.0
        for token, type_ in zip(tokens, types, strict=True)
    ]


def _adds_space(backend: dict[str, Any]) -> bool:
    """Does a text begin with a space that was not in it?"""
    told = json.dumps([backend["normalizer"], backend["pre_tokenizer"]])
    return '"Prepend"' in told or '"prepend_scheme": "first"' in told or '"prepend_scheme": "always"' in told
