"""The last release's code runs on the current schema. `make released` writes the schema of a release to a file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import psycopg
import pytest

from tests.checks.migrating import alembic
from tests.checks.released_schema import Schema, breaks, read

ROOT = Path(__file__).resolve().parents[2]
RELEASED = ROOT / "migrations" / "released.json"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
#: Constraints and triggers (`table.name`) that are newer than the release, and why its code always satisfies them.
ALLOWED: dict[str, str] = {}

BREAKING = {
    "DROP TABLE previews": "table previews was removed",
    "ALTER TABLE jobs DROP COLUMN phase": "jobs.phase was removed",
    "ALTER TABLE jobs RENAME COLUMN phase TO stage": "jobs.phase was removed",
    "ALTER TABLE jobs ALTER COLUMN seed TYPE text": "jobs.seed was bigint and is now text",
    "ALTER TABLE jobs ALTER COLUMN phase SET NOT NULL": "jobs.phase cannot be NULL any more",
    "ALTER TABLE jobs ALTER COLUMN seed DROP NOT NULL": "jobs.seed can be NULL now",
    "ALTER TABLE jobs ALTER COLUMN priority DROP DEFAULT": "jobs.priority has no default any more",
    "ALTER TABLE jobs ADD COLUMN colour text NOT NULL": "jobs.colour is new, NOT NULL and without a default",
    "ALTER TABLE jobs ADD CONSTRAINT seeds CHECK (seed > 0) NOT VALID": "jobs.seeds is new or changed",
    "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_state, ADD CONSTRAINT ck_jobs_state CHECK (state <> 'paused')": (
        "jobs.ck_jobs_state is new or changed"
    ),
    "CREATE UNIQUE INDEX one_name ON files (filename)": "files.one_name is new or changed",
    "DROP INDEX uq_jobs_idempotency": "jobs.uq_jobs_idempotency was removed",
    "CREATE TRIGGER no BEFORE UPDATE ON files EXECUTE FUNCTION jobs_epochs_only_rise()": "files.no is new or changed",
}
HARMLESS = [
    "CREATE TABLE hats (id text PRIMARY KEY, job_id text NOT NULL REFERENCES jobs (id))",
    "ALTER TABLE jobs ADD COLUMN colour text",
    "ALTER TABLE jobs ADD COLUMN colour text NOT NULL DEFAULT 'felt'",
    "CREATE INDEX by_seed ON jobs (seed)",
    "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_state",
    "ALTER TABLE jobs ALTER COLUMN phase SET DEFAULT 'staging'",
]


@pytest.fixture(scope="module")
def migrated(postgres: str) -> str:
    alembic(postgres, "upgrade", "head")
    return postgres


@pytest.fixture(scope="module")
def current(migrated: str) -> Schema:
    with psycopg.connect(migrated) as connection:
        return read(connection, VERSION)


def test_the_last_releases_code_runs_on_the_current_schema(current: Schema, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-released", default=False):
        RELEASED.write_text(current.model_dump_json(indent=1) + "\n")
    released = Schema.model_validate_json(RELEASED.read_text())
    assert breaks(released, current, allowed=ALLOWED) == [], (
        f"the code of {released.version} can fail on this schema. Spread the change over two releases, as "
        f"CONTRIBUTING.md says under Migrations. If {released.version} is not released yet, run make released"
    )


@pytest.mark.parametrize("statement", BREAKING)
def test_a_breaking_change_is_found(migrated: str, current: Schema, statement: str) -> None:
    found = breaks(current, changed(migrated, statement), allowed={})
    assert [one for one in found if one.startswith(BREAKING[statement])], found


@pytest.mark.parametrize("statement", HARMLESS)
def test_a_harmless_change_is_not_reported(migrated: str, current: Schema, statement: str) -> None:
    assert breaks(current, changed(migrated, statement), allowed={}) == []


def test_a_rule_that_the_old_code_satisfies_can_be_allowed(migrated: str, current: Schema) -> None:
    new = changed(migrated, "ALTER TABLE jobs ADD CONSTRAINT seeds CHECK (seed IS NOT NULL)")
    assert breaks(current, new, allowed={"jobs.seeds": "seed is NOT NULL anyway"}) == []


def changed(url: str, statement: str) -> Schema:
    """The schema after one more statement, which is then rolled back."""
    with psycopg.connect(url) as connection:
        connection.execute(statement.encode())
        found = read(connection, VERSION)
        connection.rollback()
    return found
