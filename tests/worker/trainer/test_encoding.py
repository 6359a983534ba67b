"""The loss falls on the right tokens, and the token that ends a turn is always among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from shared.errors import TrainingFailed
from shared.formats import FORMATS
from tests.tiny import tiny_tokenizer
from worker.trainer.encoding import CannotEncode, Encoded, Encoder


def encode(encoder: Encoder, row: dict[str, Any]) -> Encoded:
    marker = next(key for key in FORMATS if key in row)
    return encoder.encode(1, FORMATS[marker](row))


ANSWER = "<|im_start|>assistant\n"


def said(role: str, content: str) -> str:
    """A turn in ChatML."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def spans(encoder: Encoder, encoded: Encoded) -> list[tuple[bool, str]]:
    """Neighbouring tokens of one kind, as text."""
    found: list[tuple[bool, list[int]]] = []
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if not found or found[-1][0] != trained:
            found.append((trained, []))
        found[-1][1].append(token)
    return [(trained, encoder.tokenizer.decode(ids)) for trained, ids in found]


def test_text_is_trained_whole_and_ends_with_eos(encoder: Encoder) -> None:
    assert spans(encoder, encode(encoder, {"text": "a hat"})) == [(True, "a hat<|im_end|>")]


def test_completion_is_trained_and_the_prompt_is_not(encoder: Encoder) -> None:
    encoded = encode(encoder, {"prompt": "Quote by", "completion": " NAME"})
    assert spans(encoder, encoded) == [(False, "Quote by"), (True, " NAME<|im_end|>")]


def test_prompt_is_tokenized_as_it_will_be_when_it_is_used(encoder: Encoder) -> None:
    """ "th" + "e" would merge into one token, which no prompt "th" ever ends with."""
    encoded = encode(encoder, {"prompt": "th", "completion": "e hat"})
    prompt = encoder.tokenizer("th").input_ids
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert spans(encoder, encoded) == [(False, "th"), (True, "e hat<|im_end|>")]


def test_eos_is_not_doubled(encoder: Encoder) -> None:
    assert encode(encoder, {"text": "a hat<|im_end|>"}).ids.tolist() == encode(encoder, {"text": "a hat"}).ids.tolist()


def test_chat_trains_assistant_turns_through_their_end(encoder: Encoder) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "old", "weight": 0},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "a hat"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "\n  two"},
        ]
    }
    assert spans(encoder, encode(encoder, row)) == [
        (False, f"{said('system', 'S')}{said('user', 'hi')}{said('assistant', 'old')}{said('user', 'more')}{ANSWER}"),
        (True, "a hat<|im_end|>"),
        (False, f"\n{said('user', 'and')}{ANSWER}"),
        (True, "\n  two<|im_end|>"),
        (False, "\n"),
    ]


@pytest.fixture
def bos_base(tmp_path: Path) -> str:
    """A base whose tokenizer puts <|bos|> first by itself, and whose template writes it too (Llama 3, Gemma)."""
    tokenizer = tiny_tokenizer(bos_token="<|bos|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a hat"},
        {"prompt": "Quote", "completion": " by"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a hat"}]},
    ],
)
def test_bos_comes_once_and_is_not_trained(bos_base: str, row: dict[str, Any]) -> None:
    encoder = Encoder(bos_base)
    encoded = encode(encoder, row)
    bos = encoder.tokenizer.bos_token_id
    assert encoded.ids.tolist().count(bos) == 1
    assert encoded.ids[0] == bos
    assert not encoded.trained[0]


def test_no_bos_where_the_tokenizer_adds_none(encoder: Encoder) -> None:
    assert encoder.bos == []


def test_saved_truncation_is_ignored(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.save_pretrained(tmp_path)
    assert len(encode(Encoder(str(tmp_path)), {"text": "x" * 50})) == 51


def test_end_of_turn_of_the_generation_config_counts(tmp_path: Path) -> None:
    """Llama 3 and Gemma end a turn by another token than a text."""
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    encoder = Encoder(str(tmp_path))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a hat"}]}
    assert spans(encoder, encode(encoder, row))[1:] == [(True, "a hat<|im_end|>"), (False, "\n")]


def test_template_that_ends_no_turn_gets_an_eos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a hat"}]}
    assert spans(encoder, encode(encoder, row))[-1] == (True, " a hat\n<|im_end|>")


def test_template_that_rewrites_old_answers_still_trains_them(tmp_path: Path) -> None:
    """Qwen 3 writes an empty thought before the newest answer only."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path))
    turns = [("user", "hi"), ("assistant", "one"), ("user", "more"), ("assistant", "two")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    trained = [text for mark, text in spans(encoder, encode(encoder, row)) if mark]
    assert trained == ["one<|im_end|>", "<think>\ntwo<|im_end|>"]


def test_template_that_refuses_a_conversation_blames_the_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(tmp_path)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(CannotEncode, match="roles must alternate"):
        encode(Encoder(str(tmp_path)), row)


def test_chat_rows_need_a_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(TrainingFailed) as failed:
        encode(Encoder(str(tmp_path)), row)
    assert failed.value.code == "no_chat_template"


def test_base_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as failed:
        Encoder(str(tmp_path))
    assert failed.value.code == "unsupported_base_model"
