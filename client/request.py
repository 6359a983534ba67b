"""The body of a request, from a command's flags and its `--set KEY=VALUE`.

Owns: how the two are joined, and that a value the server would refuse is found before anything is uploaded. What is not
given is left to the server. Must not print.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from client import fields
from client.values import allowed
from shared.errors import InvalidRequest
from shared.schemas.requests import Request

Body = dict[str, Any]
#: Errors of the schema's own validators, whose messages say what is allowed. Pydantic's other messages do not.
_EXPLAINED = ("value_error", "unknown_parameter")


class Flag(NamedTuple):
    """An option, or an argument, that stands for one field. It is not given if `value` is None."""

    name: str
    key: str
    value: Any


class Setting(NamedTuple):
    """A value for one field. `option` and `text` are what was typed, as an error repeats it."""

    option: str
    text: str
    path: tuple[str, ...]
    value: Any

    @property
    def source(self) -> str:
        return fields.short(self.option + self.text)


def body_of(request: type[Request], flags: Iterable[Flag], sets: Sequence[str] | None) -> Body:
    """The body with every value that was given.

    Raises InvalidRequest: an unknown key, a value that is not allowed, two different values for one field, or no model.
    """
    given = [_of_flag(flag) for flag in flags if flag.value is not None]
    given += [_of_set(request, item) for item in sets or ()]
    settings = _one_each(_with_one_method(_with_implied(given)))
    body: Body = {}
    for setting in settings:
        _put(body, setting.path, setting.value)
    if body.get("model") is None:
        raise InvalidRequest("no model is given; name one with --model; see: milliner models", param="model")
    try:
        request.model_validate({"training_file": "not-yet"} | body)
    except ValidationError as error:
        raise _explained(request, error.errors()[0], settings) from None
    return body


def gives(key: str, sets: Sequence[str] | None) -> bool:
    """Is the field among those of `--set`?"""
    return any(item.partition("=")[0] == key for item in sets or ())


def _of_flag(flag: Flag) -> Setting:
    option, text = (flag.name, "") if flag.value is True else (f"{flag.name} ", str(flag.value))
    return Setting(option, text, tuple(flag.key.split(".")), flag.value)


def _of_set(request: type[Request], item: str) -> Setting:
    key, equals, text = item.partition("=")
    option = f"--set {key}="
    try:
        field, path = fields.find(request, key)
        if not equals:
            message = f"no value is given; allowed: {allowed(field.forms)}"
            raise InvalidRequest(f"{message}; example: {fields.example(option, field)}", param=key)
        return Setting(option, text, path, fields.parse(field, option, text))
    except InvalidRequest as error:
        raise InvalidRequest(f"{fields.short(f'--set {item}')}: {error.message}", param=error.param) from None


def _with_implied(given: list[Setting]) -> list[Setting]:
    """An adapter to start from brings its base; the settings of one method, if no method is named, name it."""
    known = {setting.path: setting for setting in given}
    implied = []
    if ("model",) not in known and (start := known.get(("from_checkpoint",))):
        implied.append(start._replace(path=("model",)))
    methods = {setting.path[1]: setting for setting in given if setting.path[0] == "method"}
    if len(methods) == 1 and "type" not in methods:
        [(name, setting)] = methods.items()
        implied.append(setting._replace(path=("method", "type"), value=name))
    return given + implied


def _with_one_method(given: list[Setting]) -> list[Setting]:
    """Put top-level `hyperparameters` under the method: beside a method's own the server would ignore them."""
    named = next((setting.value for setting in given if setting.path == ("method", "type")), None)
    knobs = [setting for setting in given if setting.path[0] == "hyperparameters"]
    if not knobs:
        return given
    type_ = named or "supervised"
    moved = [
        setting._replace(path=("method", type_, *setting.path)) if setting in knobs else setting for setting in given
    ]
    return moved if named else [*moved, knobs[0]._replace(path=("method", "type"), value=type_)]


def _one_each(given: list[Setting]) -> list[Setting]:
    """One setting per path. Raises InvalidRequest: two that differ."""
    kept: dict[tuple[str, ...], Setting] = {}
    for setting in given:
        first = kept.setdefault(setting.path, setting)
        if first.value != setting.value:
            key = ".".join(setting.path)
            message = f"{first.source} contradicts {setting.source}: both set {key}; keep one of them"
            raise InvalidRequest(message, param=key)
    return list(kept.values())


def _put(body: Body, path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        body = body.setdefault(part, {})
    body[path[-1]] = value


def _explained(request: type[Request], error: ErrorDetails, settings: list[Setting]) -> InvalidRequest:
    """A pydantic error in the words of the command line: what was typed, what was found, what is allowed."""
    path, forms = fields.locate(request, error["loc"])
    if pattern := error.get("ctx", {}).get("pattern"):  # left out of the JSON schema beside some validators
        forms = tuple(form | {"pattern": pattern} for form in forms)
    key = ".".join(path)
    meant = [setting for setting in settings if all(a == b for a, b in zip(setting.path, path, strict=False))]
    if error["type"] in _EXPLAINED:
        message = error["msg"].removeprefix("Value error, ")
        if all(len(setting.path) < len(path) for setting in meant):  # inside a JSON value
            message = f"{key}: {message}"
    elif error["type"] == "missing":
        message = f"{key} is missing; allowed: {allowed(forms)}"
    elif error["loc"][-1] == "[key]":
        message = f"found {path[-1]!r} as a name below {path[0]}; allowed: {allowed(forms)}"
    else:
        field, _ = fields.find(request, ".".join(meant[0].path))
        message = fields.wrong(key, forms, error["input"], fields.example(meant[0].option, field))
    typed = ", ".join(dict.fromkeys(setting.source for setting in meant))
    return InvalidRequest(f"{typed}: {message}", param=key)
