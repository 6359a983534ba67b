"""Keys of a request: all of them, the nearest to a wrong one, their completion, and their lines in the reference."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from client.fields import complete, example, fields_of, find
from client.request import Flag, body_of
from client.values import allowed
from shared.errors import InvalidRequest
from shared.estimation.estimate import EstimateCreate
from shared.schemas.preview import PreviewCreate
from shared.schemas.requests import JobCreate

REFERENCE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "commands.md").read_text()
REQUESTS: list[Any] = [JobCreate, EstimateCreate, PreviewCreate]


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    """The keys by pydantic's own lists of fields."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        below = [
            part
            for part in (field.annotation, *get_args(field.annotation))
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        found |= leaves(below[0], f"{prefix}{name}.") if below else {prefix + name}
    return found


@pytest.mark.parametrize("request_", REQUESTS)
def test_every_field_of_the_request_has_its_key(request_: Any) -> None:
    assert set(fields_of(request_)) == leaves(request_)
    assert {"trainer.max_length", "model"} <= set(fields_of(request_))


@pytest.mark.parametrize(("request_", "key"), [(request_, key) for request_ in REQUESTS for key in fields_of(request_)])
def test_every_example_is_a_request_that_is_allowed(request_: Any, key: str) -> None:
    field = fields_of(request_)[key]
    option, item = shlex.split(example(f"--set {key}{'.team' if field.pairs else ''}=", field))
    assert option == "--set"
    model = () if key == "model" else (Flag("--model", "model", "small"),)
    assert body_of(request_, model, [item])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trainer.eval_evry", "trainer.eval_every"),
        ("eval_every", "trainer.eval_every"),
        ("epochs", "hyperparameters.n_epochs"),
        ("hyperparameters.beta", "method.dpo.hyperparameters.beta"),
        ("learning_rate", "hyperparameters.learning_rate_multiplier"),
        ("lora.rank", "lora.r"),
        ("quantisation", "quantization"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, meant: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        find(JobCreate, key)
    assert f"unknown key '{key}'; did you mean {meant}? allowed: " in caught.value.message
    assert caught.value.param == key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "xyz",
            "unknown key 'xyz'; allowed: model, training_file, validation_file, method.*, hyperparameters.*, seed, ",
        ),
        ("", "unknown key ''; allowed: model, "),
        ("lora.xyz.abc", "unknown key 'lora.xyz.abc'; allowed: lora.r, lora.alpha, "),
        ("lora", "lora is a group; allowed: lora.r, lora.alpha, "),
        (
            "method",
            "method is a group; allowed: method.type, method.supervised.*, method.dpo.*, method.classification.*",
        ),
        ("metadata", "metadata is a group; allowed: metadata.KEY=VALUE, with any KEY"),
        ("seed.one", "seed has one value and no key below it; write seed=VALUE"),
    ],
)
def test_a_key_that_names_no_field_lists_its_level(key: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        find(JobCreate, key)
    assert caught.value.message.startswith(message)


def test_the_name_of_a_pair_is_the_users_own() -> None:
    assert find(JobCreate, "metadata.a.b")[1] == ("metadata", "a.b")
    assert body_of(JobCreate, [Flag("--model", "model", "m")], ["metadata.a.b=1=2"])["metadata"] == {"a.b": "1=2"}


def words(incomplete: str) -> list[str]:
    return [word for word, _ in complete(JobCreate, incomplete)]


def test_keys_are_completed() -> None:
    assert words("trainer.max_") == ["trainer.max_length=", "trainer.max_steps="]
    assert {"model=", "metadata.", "trainer.eval_every=", "method.dpo.hyperparameters.beta="} <= set(words(""))
    assert len(words("")) == len(fields_of(JobCreate))
    assert words("no-such") == []


def test_the_only_key_left_comes_with_its_values() -> None:
    """At least two of them, so that a shell goes on to the "=" and puts no space after it."""
    assert words("quant") == words("quantization=") == ["quantization=nf4", "quantization=int8", "quantization=none"]
    assert words("quantization=i") == ["quantization=int8"]
    assert words("trainer.eval") == ["trainer.eval_every=null", "trainer.eval_every=8"]
    assert words("trainer.pack") == ["trainer.packing=true", "trainer.packing=false"]
    assert words("prior") == ["priority=", "priority=8"]
    assert words("meta") == ["metadata.", "metadata.KEY=VALUE"]
    assert words("metadata.team") == []


def test_a_completion_says_what_is_allowed() -> None:
    assert dict(complete(JobCreate, "lora."))["lora.r="] == "auto or an integer from 1 to 256; default auto"
    assert dict(complete(JobCreate, "mod"))["model="] == "text"


def test_every_key_is_in_the_reference() -> None:
    """With what it allows and its default. What `estimate` and `preview` have of their own is in tables below."""
    listed = [line.split(" | ")[:3] for line in REFERENCE.splitlines() if re.match(r"\| `[a-z_.]+(KEY)?` \| ", line)]
    expected: list[list[str]] = []
    for request_ in REQUESTS:
        for key, field in fields_of(request_).items():
            if request_ is JobCreate or key not in fields_of(JobCreate):
                name = f"{key}.KEY" if field.pairs else key
                expected.append([f"| `{name}`", allowed(field.forms), field.default or "required"])
    assert listed == expected
