"""The right tokens are trained, and the token that ends a turn is always among them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from shared.datasets.formats import FORMATS, Chat, Completion
from shared.errors import TrainingFailed
from tests.tiny import CHATML, tiny_tokenizer
from worker.trainer.data.encoding import CannotEncode, Encoded, Encoder

EncoderOf = Callable[[str], Encoder]


def encode(encoder: Encoder, row: dict[str, Any]) -> Encoded:
    marker = next(key for key in FORMATS if key in row)
    example = FORMATS[marker](row)
    assert isinstance(example, Chat | Completion)
    found = encoder.encode(1, example)
    assert isinstance(found, Encoded)
    return found


ANSWER = "<|im_start|>assistant\n"


def turn(role: str, content: str) -> str:
    """A turn in ChatML."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def spans(encoder: Encoder, encoded: Encoded) -> list[tuple[bool, str]]:
    """Runs of trained or untrained tokens, as text."""
    found: list[tuple[bool, list[int]]] = []
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if not found or found[-1][0] != trained:
            found.append((trained, []))
        found[-1][1].append(token)
    return [(trained, encoder.tokenizer.decode(ids)) for trained, ids in found]


def test_all_of_a_text_is_trained_and_it_ends_with_eos(encoder: Encoder) -> None:
    assert spans(encoder, encode(encoder, {"text": "a hat"})) == [(True, "a hat<|im_end|>")]


def test_completion_is_trained_and_the_prompt_is_not(encoder: Encoder) -> None:
    encoded = encode(encoder, {"prompt": "Quote by", "completion": " NAME"})
    assert spans(encoder, encoded) == [(False, "Quote by"), (True, " NAME<|im_end|>")]


def test_prompt_is_tokenized_as_it_will_be_at_inference(encoder: Encoder) -> None:
    """ "th" + "e" would become one token, but the prompt "th" alone does not end with it."""
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
        (
            False,
            f"{turn('system', 'S')}{turn('user', 'hi')}{turn('assistant', 'old')}{turn('user', 'more')}{ANSWER}",
        ),
        (True, "a hat<|im_end|>"),
        (False, f"\n{turn('user', 'and')}{ANSWER}"),
        (True, "\n  two<|im_end|>"),
        (False, "\n"),
    ]


@pytest.fixture
def bos_base(tmp_path: Path) -> str:
    """A base whose tokenizer adds <|bos|> by itself, and whose template writes it too (Llama 3, Gemma)."""
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
        {"text": "<|bos|>a hat"},
        {"prompt": "Quote", "completion": " by"},
        {"prompt": "<|bos|>Quote", "completion": " by"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a hat"}]},
    ],
)
def test_bos_occurs_once_and_is_not_trained(bos_base: str, row: dict[str, Any]) -> None:
    encoder = Encoder(bos_base)
    encoded = encode(encoder, row)
    bos = encoder.tokenizer.bos_token_id
    assert encoded.ids.tolist().count(bos) == 1
    assert encoded.ids[0] == bos
    assert not encoded.trained[0]


def test_no_bos_if_the_tokenizer_adds_none(encoder: Encoder) -> None:
    assert encoder.bos == []


def test_saved_truncation_is_ignored(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.save_pretrained(tmp_path)
    assert len(encode(Encoder(str(tmp_path)), {"text": "x" * 50})) == 51


def test_end_of_turn_of_the_generation_config_is_a_stop(tmp_path: Path) -> None:
    """Llama 3 and Gemma end a turn with another token than a text."""
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    encoder = Encoder(str(tmp_path))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a hat"}]}
    assert spans(encoder, encode(encoder, row))[1:] == [(True, "a hat<|im_end|>"), (False, "\n")]


def test_eos_is_added_if_the_template_does_not_end_a_turn(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a hat"}]}
    assert spans(encoder, encode(encoder, row))[-1] == (True, "a hat\n<|im_end|>")


def test_older_answers_are_trained_even_if_the_template_changes_them(tmp_path: Path) -> None:
    """Qwen 3 writes an empty thought before the last answer only."""
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


@pytest.fixture
def encoder_of(tmp_path: Path) -> EncoderOf:
    def make(template: str) -> Encoder:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        return Encoder(str(tmp_path))

    return make


CALL = [{"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"c":1}'}}]
#: Thoughts and tool calls as in Qwen 3's template.
THOUGHTFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function | tojson }}</call>{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("older", "following", "wanted"),
    [
        ({"content": None, "tool_calls": CALL}, "5", '<call>{"name": "w", "arguments": {"c": 1}}</call><|im_end|>'),
        ({"content": "see", "tool_calls": CALL}, "s", 'see<call>{"name": "w", "arguments": {"c": 1}}</call><|im_end|>'),
        ({"content": "yes"}, "", "yes<|im_end|>"),
    ],
)
def test_older_answer_is_trained_up_to_its_stop(
    encoder_of: EncoderOf, older: dict[str, Any], following: str, wanted: str
) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant"} | older, {"role": "tool", "content": following}]
    encoder = encoder_of(THOUGHTFUL)
    encoded = encode(encoder, {"messages": [*messages, {"role": "assistant", "content": "x"}]})
    trained = [text for mark, text in spans(encoder, encoded) if mark]
    assert trained == [wanted, "<think>\n\n</think>\n\nx<|im_end|>"]


def test_without_stop_tokens_an_older_answer_needs_a_following_text(encoder_of: EncoderOf) -> None:
    encoder = encoder_of(THOUGHTFUL.replace("<|im_end|>", ""))

    def trained(following: str) -> list[str]:
        turns = [("user", "q"), ("assistant", "yes"), ("user", following), ("assistant", "x")]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        return [text for mark, text in spans(encoder, encode(encoder, row)) if mark]

    assert trained("more")[0].startswith("yes")
    with pytest.raises(CannotEncode, match=r"messages\[1\]: .* changes this turn"):
        trained("")


QWEN = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant', 'tool') %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("role", "name"), [("developer", "system"), ("function", "tool")])
def test_roles_are_renamed_only_if_the_template_does_not_know_them(encoder_of: EncoderOf, role: str, name: str) -> None:
    turns = [(role, "always French"), ("user", "q"), ("assistant", "x")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    encoder = encoder_of(QWEN)
    assert turn(name, "always French") in spans(encoder, encode(encoder, row))[0][1]
    encoder = encoder_of(QWEN.replace("'system'", f"'{role}', 'system'"))
    assert turn(role, "always French") in spans(encoder, encode(encoder, row))[0][1]


def test_content_that_the_template_omits_is_an_error(encoder_of: EncoderOf) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "always French"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "x"},
        ]
    }
    with pytest.raises(CannotEncode, match=r"messages\[0\].content: .* leaves this content out"):
        encode(encoder_of(QWEN.replace("'system', ", "")), row)


@pytest.mark.parametrize(
    ("answer", "trained", "warned"),
    [
        ("x", "x<|im_end|>", True),
        ("<that", "<that<|im_end|>", True),
        ("<think>\nhm</think>x", "hm</think>x<|im_end|>", False),
    ],
)
def test_generation_prompt_may_open_a_thought(encoder_of: EncoderOf, answer: str, trained: str, warned: bool) -> None:
    """Without a thought (DeepSeek R1, QwQ), an answer is trained from the start of its turn, with a warning."""
    encoder = encoder_of(CHATML.replace("assistant\n", "assistant\n<think>\n"))
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}
    assert [text for mark, text in spans(encoder, encode(encoder, row)) if mark] == [trained]
    assert [("<think>" in warning) for warning in encoder.warnings()] == [True] * warned


def test_answer_is_tokenized_separately_if_a_token_would_span_the_boundary(encoder_of: EncoderOf) -> None:
    """ " hat" would be one token, but after the prompt "assistant: " no generation can begin with it."""
    encoder = encoder_of(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [("user", "q"), ("assistant", "hat"), ("user", "q"), ("assistant", "the hat")]
    encoded = encode(encoder, {"messages": [{"role": role, "content": content} for role, content in turns]})
    prompt = encoder.tokenizer("user: q<|im_end|>\nassistant: ").input_ids
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert [text for mark, text in spans(encoder, encoded) if mark] == ["hat<|im_end|>", "the hat<|im_end|>"]


def test_tokens_of_spaces_are_trained_even_if_offsets_are_trimmed(tmp_path: Path) -> None:
    """In GPT-NeoX and others, the offsets of such a token cover no character."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path))
    answer = "\n\n a:\n\n\tb  c \n"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]}
    trained = [text for mark, text in spans(encoder, encode(encoder, row)) if mark]
    assert trained == [f"{answer}<|im_end|>"]


def test_an_error_of_the_template_is_an_error_of_the_row(tmp_path: Path) -> None:
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


def test_an_io_error_of_the_tokenizer_is_not_reported_as_the_users_error(unreadable: Callable[[str], str]) -> None:
    with pytest.raises(OSError, match="Errno 5"):
        Encoder(unreadable("tokenizer.json"))


def test_base_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as failed:
        Encoder(str(tmp_path))
    assert failed.value.code == "unsupported_base_model"
