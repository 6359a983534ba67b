"""What the JSON schema of a value allows: in words, as examples, and as the value that a text stands for.

Owns: the order in which the forms of a value are tried. Must not know keys or options.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

Schema = dict[str, Any]
#: What `read` answers for text that no form allows; None is the value of "null".
NO_MATCH = object()
#: Tried in this order: text is the last, because it would take any other value.
_ORDER = ("null", "boolean", "integer", "number", "array", "object", "string")
#: Examples; the first within a field's bounds is shown.
_INTEGERS, _NUMBERS, _TEXT = (8, 1), (0.5, 16.0), "name"


def forms_of(schema: Schema) -> tuple[Schema, ...]:
    return tuple(schema["anyOf"]) if "anyOf" in schema else (schema,)


def allowed(forms: Sequence[Schema]) -> str:
    """`auto or an integer from 1 to 50`"""
    words = [word for form in sorted(forms, key=_rank) for word in _words(form)]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def read(forms: Sequence[Schema], text: str) -> Any:
    """The value that the text stands for, or NO_MATCH. Bounds are not checked."""
    values = (_read_as(form, text) for form in sorted(forms, key=_rank))
    return next((value for value in values if value is not NO_MATCH), NO_MATCH)


def suggestions(forms: Sequence[Schema]) -> list[str]:
    """Values to offer: all that can be listed, then an example of what cannot."""
    listed = [value for form in forms for value in _literals(form)]
    return listed + [sample for form in forms if (sample := _sample(form)) is not None]


def _rank(form: Schema) -> int:
    return -1 if _literals(form) else _ORDER.index(form["type"])


def _literals(form: Schema) -> list[str]:
    """The values that can be listed, as text."""
    if form.get("type") == "boolean":
        return ["true", "false"]
    if form.get("type") == "null":
        return ["null"]
    return [str(value) for value in form.get("enum", [form["const"]] if "const" in form else [])]


def _read_as(form: Schema, text: str) -> Any:
    if literals := _literals(form):
        spelled = {"true": True, "false": False, "null": None} if form["type"] in ("boolean", "null") else {}
        return spelled.get(text, text) if text in literals else NO_MATCH
    match form["type"]:
        case "integer":
            return int(text) if re.fullmatch(r"[+-]?\d{1,400}", text) else NO_MATCH
        case "number":
            return _number(text)
        case "array":
            return _list(form["items"], text)
        case "string":
            return text
    return NO_MATCH


def _number(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return NO_MATCH
    return number if math.isfinite(number) else NO_MATCH


def _list(items: Schema, text: str) -> Any:
    """JSON, or values with commas between them; objects are JSON only."""
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return NO_MATCH
    if any("properties" in form for form in forms_of(items)):
        return NO_MATCH
    values = [read(forms_of(items), part.strip()) for part in text.split(",")] if text else []
    return NO_MATCH if NO_MATCH in values else values


def _words(form: Schema) -> list[str]:
    """What a form allows, as alternatives."""
    if literals := _literals(form):
        return literals
    match form["type"]:
        case "integer":
            return [f"an integer{_range(form)}"]
        case "number":
            return [f"a number{_range(form)}"]
        case "array" if "properties" in form["items"]:
            return [f"a JSON list of objects with the keys {'/'.join(form['items']['properties'])}"]
        case "array" if form["items"] == {"type": "string"}:
            return ["a comma-separated list"]
        case "array":
            return [f"a comma-separated list of {allowed(forms_of(form['items']))}"]
        case "string":
            return [f"text{_length(form)}" + (f" matching {form['pattern']}" if "pattern" in form else "")]
    return ["a JSON object"]


def _range(form: Schema) -> str:
    """` from 1 to 50`, ` above 0 and at most 100`"""
    low, high, above, below = (
        form.get(name) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    )
    if form["type"] == "integer" and below is not None:
        high, below = below - 1, None
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if form["type"] == "number" else f" from {low} to {high}"
    bounds = {"of at least": low, "above": above, "at most": high, "below": below}
    words = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    return f" {' and '.join(words)}" if words else ""


def _length(form: Schema) -> str:
    low, high = form.get("minLength"), form.get("maxLength")
    if high is None:
        return ""
    return f" of {low} to {high} characters" if low else f" of up to {high} characters"


def _sample(form: Schema) -> str | None:
    if _literals(form):
        return None
    match form["type"]:
        case "integer" | "number":
            values = _INTEGERS if form["type"] == "integer" else _NUMBERS
            return f"{next((value for value in values if _within(form, value)), form.get('minimum', 0)):g}"
        case "array" if "properties" in form["items"]:
            return json.dumps([_sample_object(form["items"])])
        case "array":
            return suggestions(forms_of(form["items"]))[0]
    return _TEXT


def _within(form: Schema, value: float) -> bool:
    low, high = form.get("minimum", -math.inf), form.get("maximum", math.inf)
    above, below = form.get("exclusiveMinimum", -math.inf), form.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)


def _sample_object(schema: Schema) -> Schema:
    """The required keys. One that names a type brings the settings below the type's own name."""
    sample: Schema = {name: suggestions(forms_of(schema["properties"][name]))[0] for name in schema["required"]}
    for value in list(sample.values()):
        for form in forms_of(schema["properties"].get(value, {})):
            if "properties" in form:
                sample[value] = _sample_object(form)
    return sample
