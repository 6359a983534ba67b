"""The fields of a request by dotted key, such as `trainer.eval_every`: what each allows, and its value from text.

Owns: keys, their completion, and the errors for a key or a value that is not allowed. All of it is derived from the
request's JSON schema, so a new field needs no line here. Must not know the flags of a command.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from client.values import NO_MATCH, Schema, allowed, forms_of, read, suggestions
from shared.errors import InvalidRequest

#: Characters of a value that an error repeats.
_LONGEST = 100


@dataclass(frozen=True, slots=True)
class Field:
    """One value of a request. Each of `forms` is a JSON schema that it may match.

    `default` is as one would type it, empty for what is required. `pairs`: the field is a map, so the key is followed
    by a name of the user's own, as in `metadata.team`.
    """

    key: str
    forms: tuple[Schema, ...]
    default: str
    pairs: bool = False


@cache
def fields_of(request: type[BaseModel]) -> dict[str, Field]:
    """Every field of a request by its key, in the order of the schema."""
    return {field.key: field for field in _walk(_schema_of(request), "")}


def find(request: type[BaseModel], key: str) -> tuple[Field, tuple[str, ...]]:
    """The field, and the path of its value in the request. Raises InvalidRequest: there is no such field."""
    known = fields_of(request)
    if key in known and not known[key].pairs:
        return known[key], tuple(key.split("."))
    for field in known.values():
        if field.pairs and key.startswith(f"{field.key}."):
            return field, (*field.key.split("."), key.removeprefix(f"{field.key}."))
    raise _unknown(key, known)


def parse(field: Field, option: str, text: str) -> Any:
    """The value of `option` followed by the text. Raises InvalidRequest: it is of no type that the field allows."""
    value = read(field.forms, text)
    if value is NO_MATCH:
        raise InvalidRequest(wrong(field.key, field.forms, text, example(option, field)), param=field.key)
    return value


def locate(request: type[BaseModel], loc: Sequence[str | int]) -> tuple[tuple[str, ...], tuple[Schema, ...]]:
    """The path of a pydantic error without pydantic's names for members of a union, and the forms allowed there."""
    schema, parts = _schema_of(request), list[str]()
    for part in loc:
        if part == "[key]":  # after the name of a pair: the error is about the name itself
            schema = {"type": "string"} | schema.get("names", {})
        elif (below := _below(schema, part)) is not None:
            schema = below
            parts.append(str(part))
    return tuple(parts), forms_of(schema)


def wrong(key: str, forms: Sequence[Schema], found: Any, remedy: str) -> str:
    """What was found, what is allowed, and an example."""
    shown = short(json.dumps(found, ensure_ascii=False, default=str))
    return f"found {shown} for {key}; allowed: {allowed(forms)}; example: {remedy}"


def example(option: str, field: Field) -> str:
    """The option with a value that is allowed, to copy into a shell: `--set lora.r=8`."""
    return option + shlex.quote(suggestions(field.forms)[-1])


def short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def complete(request: type[BaseModel], incomplete: str) -> list[tuple[str, str]]:
    """Completions of KEY=VALUE, each with what the field allows.

    A key that is the only one left comes with its values. There are at least two of them, because a shell puts a space
    after a single completion, and KEY= must be followed by a value at once.
    """
    known = {field.key + ("." if field.pairs else "="): field for field in fields_of(request).values()}
    matching = [start for start in known if start.startswith(incomplete) or incomplete.startswith(start)]
    if len(matching) != 1:
        return [(start, _help(known[start])) for start in matching]
    start, field = matching[0], known[matching[0]]
    values = ["KEY=VALUE"] if field.pairs else suggestions(field.forms)
    words = [start + value for value in ([] if len(values) > 1 else [""]) + values]
    return [(word, _help(field)) for word in words if word.startswith(incomplete)]


def _help(field: Field) -> str:
    return allowed(field.forms) + (f"; default {field.default}" if field.default and not field.pairs else "")


def _walk(schema: Schema, prefix: str) -> Iterator[Field]:
    for name, value in schema["properties"].items():
        key, forms = prefix + name, forms_of(value)
        groups = [form for form in forms if "properties" in form]
        maps = [form for form in forms if "values" in form]
        if groups:
            yield from _walk(groups[0], f"{key}.")
        elif maps:
            yield Field(key, forms_of(maps[0]["values"]), _default(value), pairs=True)
        else:
            yield Field(key, forms, _default(value))


def _default(schema: Schema) -> str:
    return json.dumps(schema["default"]).strip('"') if "default" in schema else ""


@cache
def _schema_of(request: type[BaseModel]) -> Schema:
    schema = request.model_json_schema()
    resolved: Schema = _resolved(schema, schema.get("$defs", {}))
    return resolved


def _resolved(node: Any, definitions: Schema) -> Any:
    """Put each definition where it is referred to. A map gets `values` and `names`, the schemas of both."""
    if isinstance(node, list):
        return [_resolved(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        named = definitions[node["$ref"].removeprefix("#/$defs/")]
        return _resolved(named | {key: value for key, value in node.items() if key != "$ref"}, definitions)
    schema = {key: _resolved(value, definitions) for key, value in node.items() if key != "$defs"}
    if isinstance(schema.get("additionalProperties"), dict):
        schema["values"] = schema["additionalProperties"] | {"names": schema.get("propertyNames", {})}
    return schema


def _below(schema: Schema, part: str | int) -> Schema | None:
    for form in forms_of(schema):
        found = form.get("items") if isinstance(part, int) else form.get("properties", {}).get(part, form.get("values"))
        if found is not None:
            return dict(found)
    return None


def _unknown(key: str, known: dict[str, Field]) -> InvalidRequest:
    """Name the nearest keys, and all of the level that the key belongs to."""
    groups = {name[: match.start()] for name in known for match in re.finditer(r"\.", name)}
    if key in groups or (key in known and known[key].pairs):
        return InvalidRequest(f"{key} is a group; allowed: {_level(key, known)}", param=key)
    parents = [key[: match.start()] for match in re.finditer(r"\.", key)]
    if leaf := next((parent for parent in parents if parent in known), None):
        return InvalidRequest(f"{leaf} has one value and no key below it; write {leaf}=VALUE", param=key)
    level = next((parent for parent in reversed(parents) if parent in groups), "")
    meant = _nearest(key, known)
    question = f"; did you mean {' or '.join(meant)}?" if meant else ";"
    return InvalidRequest(f"unknown key {key!r}{question} allowed: {_level(level, known)}", param=key)


def _level(group: str, known: dict[str, Field]) -> str:
    """The keys one level below a group: `model, trainer.*`."""
    if group in known:
        return f"{group}.KEY=VALUE, with any KEY"
    prefix = f"{group}." if group else ""
    rests = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    tops = dict.fromkeys(rest.split(".")[0] for rest in rests)
    names = [top if top in rests and not known[prefix + top].pairs else f"{top}.*" for top in tops]
    return ", ".join(prefix + name for name in names)


def _nearest(key: str, known: dict[str, Field]) -> list[str]:
    """At most two keys that are spelled alike, in whole or in their last part."""

    def likeness(name: str) -> float:
        pairs = [(name, key)]
        last = (_last(name), _last(key))
        if min(map(len, last)) > 2:
            pairs.append(last)
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    alike = sorted(known, key=lambda name: (-likeness(name), len(name)))
    shortest = {_last(name): name for name in reversed(alike)}  # several methods have the same last part
    best = likeness(alike[0])
    return [name for name in alike if name in shortest.values() and likeness(name) >= max(0.6, best - 0.05)][:2]


def _last(key: str) -> str:
    return key.rpartition(".")[2]
