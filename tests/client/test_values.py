"""Values as people type them, by the JSON schema of a field."""

from __future__ import annotations

from typing import Any

import pytest

from client.fields import fields_of
from client.values import NO_MATCH, allowed, read
from shared.schemas.requests import JobCreate

FIELDS = fields_of(JobCreate)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lora.r", "16", 16),
        ("lora.r", "auto", "auto"),
        ("lora.alpha", "1e2", 100.0),
        ("lora.target_modules", "all-linear", "all-linear"),
        ("lora.target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("lora.target_modules", '["q_proj","v_proj"]', ["q_proj", "v_proj"]),
        ("trainer.exports", "merged,gguf_merged", ["merged", "gguf_merged"]),
        ("trainer.exports", "", []),
        ("trainer.packing", "false", False),
        ("trainer.gradient_checkpointing", "auto", "auto"),
        ("trainer.gradient_checkpointing", "true", True),
        ("trainer.eval_every", "null", None),
        ("trainer.eval_every", "20", 20),
        ("quantization", "int8", "int8"),
        ("suffix", "null", None),
        ("suffix", "12", "12"),
        ("metadata", "null", "null"),
        ("priority", "-5", -5),
        ("integrations", '[{"type": "wandb"}]', [{"type": "wandb"}]),
    ],
)
def test_a_value_has_the_type_of_its_field(key: str, text: str, value: Any) -> None:
    found = read(FIELDS[key].forms, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("lora.r", ""),
        ("lora.r", "2.5"),
        ("lora.r", "Auto"),
        ("lora.r", "null"),
        ("lora.alpha", "nan"),
        ("lora.alpha", "1e999"),
        ("trainer.packing", "yes"),
        ("trainer.exports", "merged,gguf"),
        ("trainer.exports", "[merged"),
        ("trainer.eval_every", "9" * 500),
        ("quantization", "int4"),
        ("integrations", "wandb"),
    ],
)
def test_text_of_no_type_that_is_allowed(key: str, text: str) -> None:
    assert read(FIELDS[key].forms, text) is NO_MATCH


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("trainer.eval_every", "null or an integer of at least 1"),
        ("lora.dropout", "a number of at least 0 and below 1"),
        ("lora.loraplus_lr_ratio", "null or a number from 1 to 1024"),
        ("seed", "null or an integer from 0 to 2147483647"),
        ("suffix", "null or text of up to 64 characters matching ^[A-Za-z0-9._-]*$"),
        ("quantization", "nf4, int8 or none"),
        ("trainer.gradient_checkpointing", "auto, true or false"),
        ("lora.target_modules", "all-linear or a comma-separated list"),
        ("integrations", "null or a JSON list of objects with the keys type/wandb/mlflow"),
    ],
)
def test_what_is_allowed_in_words(key: str, words: str) -> None:
    assert allowed(FIELDS[key].forms) == words
