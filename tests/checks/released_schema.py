"""Compare the last release's schema with a newer one: find the changes that would break that release's code.

During an upgrade, old processes run on the new schema and share rows with new processes. So the old code must still be
able to name and read its columns, to insert rows without columns that it does not know, and to update rows.

Only the shape of the tables is compared. A new state, or a new key in a JSON column, that the old code cannot read is
not detected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import psycopg
from pydantic import BaseModel

COLUMNS = """
    SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), NOT a.attnotnull, a.atthasdef
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND c.relname <> 'alembic_version'
        AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY c.relname, a.attname
"""
# What can refuse a row: constraints, unique indexes that belong to no constraint, and triggers.
RULES = """
    SELECT c.relname, rule.name, rule.definition FROM pg_class c JOIN (
        SELECT conrelid, conname, replace(pg_get_constraintdef(oid), ' NOT VALID', '')
        FROM pg_constraint WHERE contype IN ('p', 'u', 'f', 'c', 'x')
        UNION ALL SELECT indrelid, indexrelid::regclass::text, pg_get_indexdef(indexrelid)
        FROM pg_index WHERE indisunique AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
        UNION ALL SELECT tgrelid, tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
    ) AS rule (relation, name, definition) ON c.oid = rule.relation
    WHERE c.relnamespace = 'public'::regnamespace AND c.relname <> 'alembic_version'
    ORDER BY c.relname, rule.name
"""
UNIQUE = ("PRIMARY KEY", "UNIQUE", "CREATE UNIQUE INDEX")


class Column(BaseModel):
    type: str
    nullable: bool
    default: bool


class Table(BaseModel):
    columns: dict[str, Column] = {}
    rules: dict[str, str] = {}


class Schema(BaseModel):
    """The tables of a version of the code."""

    version: str
    tables: dict[str, Table]


def read(connection: psycopg.Connection, version: str) -> Schema:
    """Read the schema of a migrated database."""
    tables: dict[str, Table] = {}
    for table, name, kind, nullable, default in connection.execute(COLUMNS):
        tables.setdefault(table, Table()).columns[name] = Column(type=kind, nullable=nullable, default=default)
    for table, name, definition in connection.execute(RULES):
        tables[table].rules[name] = definition
    return Schema(version=version, tables=tables)


def breaks(old: Schema, new: Schema, *, allowed: Mapping[str, str]) -> list[str]:
    """The changes that may break the old code. `allowed`: new rules (`table.rule`) that it always satisfies."""
    found: list[str] = []
    for name, table in old.tables.items():
        if name not in new.tables:
            found.append(f"table {name} was removed")
        else:
            found += [f"{name}.{change}" for change in _of_columns(table, new.tables[name])]
            rules = _of_rules(table, new.tables[name])
            found += [f"{name}.{rule}{change}" for rule, change in rules if f"{name}.{rule}" not in allowed]
    return found


def _of_columns(old: Table, new: Table) -> Iterator[str]:
    for name, was in old.columns.items():
        now = new.columns.get(name)
        if now is None:
            yield f"{name} was removed"
            continue
        if now.type != was.type:
            yield f"{name} was {was.type} and is now {now.type}"
        if now.nullable and not was.nullable:
            yield f"{name} can be NULL now: the old code cannot read NULL"
        if was.nullable and not now.nullable:
            yield f"{name} cannot be NULL any more: the old code may write NULL"
        if was.default and not now.default:
            yield f"{name} has no default any more: the old code may leave it out"
    for name in new.columns.keys() - old.columns.keys():
        if not new.columns[name].nullable and not new.columns[name].default:
            yield f"{name} is new, NOT NULL and without a default: the old code does not write it"


def _of_rules(old: Table, new: Table) -> Iterator[tuple[str, str]]:
    for name, definition in new.rules.items():
        if old.rules.get(name) != definition:
            yield name, f" is new or changed: the old code may violate it ({definition})"
    for name, definition in old.rules.items():
        if name not in new.rules and definition.startswith(UNIQUE):
            yield name, f" was removed: ON CONFLICT in the old code may need it ({definition})"
