"""Encode an example as token ids, and mark the ids that are trained.

Owns: chat templates, special tokens, and which tokens carry the loss. Must not import torch, nor know about files or
batches.

The token that ends a turn or a text is always trained, even if the tokenizer uses it for padding. Otherwise the tuned
model would never stop.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shared.datasets.formats import Chat, Completion, Preference
from shared.errors import TrainingFailed
from worker.trainer.system.resource_errors import is_kernel_error

#: Some of OpenAI's roles, and what most chat templates call them.
ROLE_ALIASES = {"developer": "system", "function": "tool"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as tokens: `ids` int32 (length,), `trained` bool (length,).

    `trained[i]` says that predicting token i carries the loss. `line` is the row's line in its file (1-based).
    """

    line: int
    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Number of trained tokens. The first token does not count: nothing predicts it."""
        return int(self.trained[1:].sum())

    @property
    def documents(self) -> tuple[Encoded, ...]:
        return (self,)

    @property
    def learnable(self) -> bool:
        """Whether training on it has any effect."""
        return self.trained_tokens > 0

    @property
    def content(self) -> bytes:
        """Bytes that are equal for two documents with the same tokens and the same trained marks."""
        return self.ids.tobytes() + self.trained.tobytes()

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens."""
        return self if len(self) <= length else Encoded(self.line, self.ids[:length], self.trained[:length])


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected answer to one prompt: two documents that go through the model together."""

    chosen: Encoded
    rejected: Encoded

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def line(self) -> int:
        return self.chosen.line

    @property
    def trained_tokens(self) -> int:
        return self.chosen.trained_tokens + self.rejected.trained_tokens

    @property
    def documents(self) -> tuple[Encoded, ...]:
        return (self.chosen, self.rejected)

    @property
    def learnable(self) -> bool:
        """False if the two answers are equal, which truncation can cause: then there is no preference to learn."""
        same = np.array_equal(self.chosen.ids, self.rejected.ids)
        return self.chosen.learnable and self.rejected.learnable and not same

    def cut(self, length: int) -> Pair:
        """The first `length` tokens of each answer."""
        return Pair(self.chosen.cut(length), self.rejected.cut(length))


#: An encoded example, one document or a pair of them. An optimizer step consists of rows.
Row = Encoded | Pair


def longest_document(rows: Sequence[Row]) -> int:
    """Number of tokens of the longest document."""
    return max(len(document) for row in rows for document in row.documents)


class CannotEncode(Exception):
    """The base's tokenizer or chat template cannot encode an example: (field, message, hint)."""

    def __init__(self, field: str, message: str, hint: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = message
        self.hint = hint


class Encoding(Protocol):
    """Result of the Rust tokenizers: `ids`, and for each the characters [begin, end) that it covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(slots=True)
class JoinedEncoding:
    """An Encoding made of several consecutive ones."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Encoder:
    """A base model's tokenizer, with its special tokens looked up once.

    Raises TrainingFailed if the tokenizer cannot be loaded or has no character offsets. `bos` is [] or the BOS that the
    tokenizer adds before any text; `stops` are the ids that end generation; `specials` are all special ids.
    """

    def __init__(self, base_dir: str) -> None:
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                base_dir, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            if is_kernel_error(error):
                raise
            raise TrainingFailed(
                f"the base model's tokenizer cannot be loaded: {error}",
                code="unsupported_base_model",
                param="model",
                hint="import the base again with its tokenizer.json",
            ) from error
        if not self.tokenizer.is_fast:
            raise TrainingFailed(
                f"the base model's tokenizer, {type(self.tokenizer).__name__}, has no character offsets",
                code="unsupported_base_model",
                param="model",
                hint="import a base that ships a tokenizer.json",
            )
        self._fast = self.tokenizer.backend_tokenizer
        # A saved tokenizer.json may contain its author's truncation and padding.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.bos = self._own_bos()
        self.stops = self._stop_tokens(Path(base_dir))
        self._own_pad = _named_pad(Path(base_dir), self.tokenizer)
        added = self.tokenizer.added_tokens_decoder.items()
        self.specials = frozenset(self.tokenizer.all_special_ids) | {token for token, it in added if it.special}
        self._unused_opening: str | None = None

    def warnings(self) -> list[str]:
        """Warnings about the chat template that follow from the rows encoded so far."""
        if self._unused_opening is None:
            return []
        return [
            f"the base's generation prompt ends in {self._unused_opening!r}, but some answers do not continue it: they "
            "are trained from the start of the assistant's turn; to keep thoughts, write them into the answers"
        ]

    @property
    def template_sha256(self) -> str | None:
        """SHA-256 of the chat template; None without one."""
        template = self.tokenizer.chat_template
        return hashlib.sha256(str(template).encode()).hexdigest() if template else None

    def text(self, ids: list[int]) -> str:
        """Decode ids, special tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def has_double_bos(self, row: Row) -> bool:
        """Whether a document begins with two BOS: the row has one, and the tokenizer or chat template adds another."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and any(document.ids[:2].tolist() == [bos, bos] for document in row.documents)

    def encode(self, line: int, example: Chat | Completion | Preference) -> Row:
        """Encode the example of a line (1-based).

        Raises CannotEncode if this example cannot be encoded, TrainingFailed if no example of its format can.
        """
        if isinstance(example, Preference):
            return Pair(self._document(line, example.chosen), self._document(line, example.rejected))
        return self._document(line, example)

    def _document(self, line: int, example: Chat | Completion) -> Encoded:
        ids, trained = self._chat(example) if isinstance(example, Chat) else self._completion(example)
        return Encoded(line, np.asarray(ids, dtype=np.int32), np.asarray(trained, dtype=np.bool_))

    # ------------------------------------------------------------ prompt and completion

    def _completion(self, example: Completion) -> tuple[list[int], list[bool]]:
        """Ids and trained marks. BOS is added only if the tokenizer itself adds it; EOS is appended and trained.

        Prompt and completion are tokenized together, as in pretraining. If a token would span the boundary, they are
        tokenized separately, because a user's prompt is tokenized alone when the adapter is used.
        """
        prompt = self._without_bos(self._tokens(example.prompt).ids) if example.prompt else []
        joint = self._without_bos(self._tokens(example.prompt + example.completion).ids)
        if joint[: len(prompt)] != prompt:
            joint = prompt + self._tokens(example.completion).ids
        ids = [*self.bos, *joint]
        if ids[-1] != self.eos:
            ids.append(self.eos)
        untrained = len(self.bos) + len(prompt)
        return ids, [i >= untrained for i in range(len(ids))]

    # ------------------------------------------------------------ chat

    def _chat(self, example: Chat) -> tuple[list[int], list[bool]]:
        """Ids and trained marks. The conversation is rendered and tokenized once; trained turns are found by character.

        A turn begins where the rendering of the turns before it, with the generation prompt, ends. So the model learns
        to write exactly what it will be asked to write. A turn ends with its end-of-turn token.
        """
        if not self.tokenizer.chat_template:
            raise TrainingFailed(
                "the base model has no chat template, and the file has chat rows",
                code="no_chat_template",
                param="training_file",
                hint='choose an instruct model, or upload rows of "prompt" and "completion"',
            )
        template = str(self.tokenizer.chat_template)
        messages = [_template_message(turn.message, template) for turn in example.turns]
        tools = list(example.tools) or None
        full = self._render(messages, tools)
        for i, message in enumerate(messages):
            _check_rendered(f"messages[{i}].content", message["content"], full)
        begins = {i: self._begin(messages, tools, i, full) for i, turn in enumerate(example.turns) if turn.trained}
        encoding = self._tokens_apart(full, list(begins.values()))
        ids, trained = list(encoding.ids), [False] * len(encoding.ids)
        for i, begin in begins.items():
            self._mark(encoding, trained, begin, self._end(messages, tools, i, full, begin=begin, encoding=encoding))
        if example.turns[-1].trained and not any(
            token in self.stops and mark for token, mark in zip(ids[-4:], trained[-4:], strict=True)
        ):
            # The template does not end a turn with a stop token; without one the tuned model would never stop.
            ids.append(self.eos)
            trained.append(True)
        return ids, trained

    def _begin(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, i: int, full: str) -> int:
        """Character at which turn `i` begins in `full`."""
        before = self._render(messages[:i], tools, generation_prompt=True)
        if full.startswith(before):
            return len(before)
        # The generation prompt opens a thought (DeepSeek R1, QwQ), and the answer has none: the turn begins where the
        # two renderings differ. A probe answer shows where, because a real answer might start like a thought by chance.
        alone = self._render(messages[:i], tools)
        probe = self._render([*messages[:i], {"role": "assistant", "content": "\N{SECTION SIGN}"}], tools)
        opening = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, probe, strict=False)))
        if not opening.startswith(alone) or not full.startswith(opening):
            raise CannotEncode(
                f"messages[{i}]",
                "the base's chat template renders what comes before this turn differently once the turn is there",
                "begin with a system or user message, or set weight 0 on this turn",
            )
        self._unused_opening = before[len(opening) :].strip()
        return len(opening)

    def _end(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        i: int,
        full: str,
        *,
        begin: int,
        encoding: Encoding,
    ) -> int:
        """Character at which turn `i` ends in `full`."""
        upto = full if i == len(messages) - 1 else self._render(messages[: i + 1], tools)
        if full.startswith(upto):
            return len(upto)
        # Some templates (Qwen 3, DeepSeek R1) render the last answer differently from the others. The turn then ends
        # with the first stop token after its beginning, where `_mark` ends it, or else before the next message's text.
        offsets = zip(encoding.ids, encoding.offsets, strict=True)
        if any(a >= begin and token in self.stops for token, (a, _) in offsets):
            return len(full)
        content, following = str(messages[i]["content"]).strip(), str(messages[i + 1]["content"]).strip()
        at = full.find(content, begin)
        end = full.find(following, at + len(content))
        if not content or not following or at < 0 or end < 0:
            raise CannotEncode(
                f"messages[{i}]",
                "the base's chat template changes this turn once others follow it",
                "set weight 0 on this turn, or end the conversation with it",
            )
        return end

    def _mark(self, encoding: Encoding, trained: list[bool], begin: int, end: int) -> None:
        """Mark the tokens of characters [begin, end) as trained, up to the first stop token.

        What a template puts after that token, such as ChatML's newline, is never generated. Some tokenizers trim spaces
        from offsets: a token of spaces then has an empty range, at the end of the spaces.
        """
        span = [j for j, (a, b) in enumerate(encoding.offsets) if b > begin and (a < end or a == b == end)]
        for j in range(span[0], span[-1] + 1) if span else ():
            trained[j] = True
            if encoding.ids[j] in self.stops:
                break

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, generation_prompt: bool = False
    ) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            raise CannotEncode(
                "messages",
                f"the base's chat template refuses this conversation: {error}",
                "roles in an order that the base model knows",
            ) from error

    # ------------------------------------------------------------ special tokens

    def _tokens(self, text: str) -> Encoding:
        """Tokenize without the tokenizer's own BOS and EOS: a chat template writes its own."""
        encoding: Encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding

    def _tokens_apart(self, text: str, seams: list[int]) -> Encoding:
        """Tokenize the text as one, but split it at each of `seams` (characters) that a token would span.

        `_completion` says why.
        """
        joined, start = JoinedEncoding([], []), 0
        rest = self._tokens(text)
        for seam in seams:
            prompt = self._tokens(text[start:seam])
            if rest.ids[: len(prompt.ids)] != prompt.ids:
                _append(joined, prompt, start)
                start, rest = seam, self._tokens(text[seam:])
        _append(joined, rest, start)
        return joined

    def _without_bos(self, ids: list[int]) -> list[int]:
        """Remove a leading BOS that the text itself contains, if the tokenizer adds one as well."""
        return ids[1:] if self.bos and ids[:1] == self.bos else ids

    def _own_bos(self) -> list[int]:
        """[BOS] if the tokenizer puts it before any text, otherwise []."""
        bos = self.tokenizer.bos_token_id
        own = self._fast.encode("a", add_special_tokens=True).ids
        return [bos] if bos is not None and own[:1] == [bos] and self._tokens("a").ids[:1] != [bos] else []

    def _stop_tokens(self, base: Path) -> frozenset[int]:
        """Ids that end generation: EOS, and those of the base's configs (Llama 3 and Gemma add an end of turn)."""
        stops = {self.tokenizer.eos_token_id}
        for name in ("generation_config.json", "config.json"):
            path = base / name
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
            stops.update(named if isinstance(named, list) else [named])
        return frozenset(stop for stop in stops if stop is not None)

    @cached_property
    def eos(self) -> int:
        """Id that ends a text. Raises TrainingFailed if the base has none, which is normal for an encoder."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            if not self.stops:
                raise TrainingFailed(
                    "the base model has no end-of-sequence token, so a tuned model could never stop",
                    code="unsupported_base_model",
                    param="model",
                    hint="set eos_token in its tokenizer_config.json and import it again",
                )
            eos = min(self.stops)
        return int(eos)

    @property
    def pad(self) -> int:
        """Pad id of a classifier's rows. The model also finds the last real token of a row by it."""
        return self.eos if self._own_pad is None else self._own_pad


def _named_pad(base: Path, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Pad id of the config, which the model uses, or else of the tokenizer. Some configs write -1 for none."""
    path = base / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = config.get("text_config") or config
    named, rows = config.get("pad_token_id"), config.get("vocab_size")
    found = named if isinstance(named, int) and named >= 0 else tokenizer.pad_token_id
    # A token that was added to the tokenizer only has no embedding.
    return None if found is None or (isinstance(rows, int) and found >= rows) else found


def _append(joined: JoinedEncoding, more: Encoding, start: int) -> None:
    joined.ids.extend(more.ids)
    joined.offsets.extend((a + start, b + start) for a, b in more.offsets)


def _check_rendered(field: str, content: str, full: str) -> None:
    """Raise CannotEncode if a message's text is not in the rendering: templates silently skip what they do not know.

    Thoughts before `</think>` are not checked: templates may drop them from older answers.
    """
    text = content.rpartition("</think>")[2].strip()
    if text not in full and json.dumps(text, ensure_ascii=False)[1:-1] not in full:
        raise CannotEncode(
            field,
            "the base's chat template leaves this content out",
            "roles in an order that the base model knows, or an empty content",
        )


def _template_message(message: dict[str, Any], template: str) -> dict[str, Any]:
    """Convert a message of OpenAI's format for a chat template.

    A role that the template does not know gets its alias. A tool call's arguments are a JSON string in OpenAI's format;
    chat templates need the object.
    """
    role = message["role"]
    if role in ROLE_ALIASES and not re.search(rf"""role\W[^%}}]*['"]{role}['"]""", template):
        message = message | {"role": ROLE_ALIASES[role]}
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_template_call(call) for call in calls]}


def _template_call(call: Any) -> Any:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return call | {"function": call["function"] | {"arguments": arguments}}
