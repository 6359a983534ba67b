"""Arguments and sizes as people write them, and the answer as they read it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from client.estimate import bytes_of, read_arguments, verdict
from shared.errors import InvalidRequest
from shared.estimation.estimate import Data, EstimateCreate, estimate

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


@pytest.mark.parametrize(
    ("text", "number"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5g", 15 * 10**8), ("800mb", 8 * 10**8), ("123", 123)],
)
def test_sizes(text: str, number: int) -> None:
    assert bytes_of(text) == number


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-1GB", "1e9"])
def test_an_invalid_size_is_answered_with_what_is_allowed(text: str) -> None:
    with pytest.raises(InvalidRequest, match="allowed: a number with GB"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("words", "model_given", "expected"),
    [
        ([], True, (None, None)),
        (["rows.jsonl"], True, (None, "rows.jsonl")),
        (["gpt2"], False, ("gpt2", None)),
        (["gpt2", "file-1"], False, ("gpt2", "file-1")),
        ([], False, (None, None)),
    ],
)
def test_the_model_is_named_or_comes_first(
    words: list[str], model_given: bool, expected: tuple[str | None, str | None]
) -> None:
    assert read_arguments(words, model_given=model_given) == expected


def test_a_file_is_not_taken_for_a_model() -> None:
    for path in ("file-1", __file__):
        with pytest.raises(InvalidRequest, match=r"no model is given for .*; name one with --model"):
            read_arguments([path], model_given=False)


def drawn(data: Data | None = None, **fields: Any) -> str:
    answer = estimate(EstimateCreate.model_validate({"model": "gpt2"} | fields), GPT2, data)
    out = io.StringIO()
    Console(file=out, width=160, markup=False, highlight=False).print(verdict(answer))
    return out.getvalue()


def test_the_table_adds_up_to_a_verdict() -> None:
    text = drawn(Data(1000, 90_000, 400, "plan"), device_memory_bytes=24 * 10**9)
    for said in ("the frozen base", "nf4, r 16, 3 x 400 tokens, checkpointed", "fits into 24.0 GB"):
        assert said in text
    for said in ("2,359,296 of 126,799,104 parameters trained", "for 2 x 90,000 tokens", "assumed: 124.8 TFLOP/s"):
        assert said in text


def test_what_does_not_fit_comes_with_a_change_that_would() -> None:
    text = drawn(trainer={"micro_batch": 64}, device_memory_bytes=6 * 10**9)
    assert "does not fit into 6.0 GB; it fits with --set trainer.micro_batch=32: 4.0 GB" in text
    assert "no single change is enough; with all of them it needs 714.3 MB" in drawn(device_memory_bytes=10**8)
    assert "add --device-memory 24GB" in drawn()
