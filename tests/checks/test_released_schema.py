"""The last release's code runs on today's schema. `make released` writes the schema of a release to a file."""

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
#: Constraints and triggers (`table.name`) that are newer than the release, and why its code keeps to them all the same.
ALLOWED: dict[str, str] = {}

BREAKING = {
    "DROP TABLE previews": "table previews is gone",
    "ALTER TABLE jobs DROP COLUMN phase": "jobs.phase is gone",
    "ALTER TABLE jobs RENAME COLUMN phase TO stage": "jobs.phase is gone",
    "ALTER TABLE jobs ALTER COLUMN seed TYPE text": "jobs.seed was bigint and is text",
    "ALTER TABLE jobs ALTER COLUMN phase SET NOT NULL": "jobs.phase may not be NULL any more",
    "ALTER TABLE jobs ALTER COLUMN seed DROP NOT NULL": "jobs.seed may be NULL now",
    "ALTER TABLE jobs ALTER COLUMN priority DROP DEFAULT": "jobs.priority has lost its default",
    "ALTER TABLE jobs ADD COLUMN colour text NOT NULL": "jobs.colour is new, NOT NULL and without a default",
    "ALTER TABLE jobs ADD CONSTRAINT seeds CHECK (seed > 0) NOT VALID": "jobs.seeds is new or changed",
    "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_state, ADD CONSTRAINT ck_jobs_state CHECK (state <> 'paused')": (
        "jobs.ck_jobs_state is new or changed"
    ),
    "CREATE UNIQUE INDEX one_name ON files (filename)": "files.one_name is new or changed",
    "DROP INDEX uq_jobs_idempotency": "jobs.uq_jobs_idempotency is gone",
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
def today(migrated: str) -> Schema:
    with psycopg.connect(migrated) as connection:
        return read(connection, VERSION)


def test_the_last_releases_code_runs_on_the_schema_of_today(today: Schema, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-released", default=False):
        RELEASED.write_text(today.model_dump_json(indent=1) + "\n")
    released = Schema.model_validate_json(RELEASED.read_text())
    assert breaks(released, today, allowed=ALLOWED) == [], (
        f"the code of {released.version} can fail on this schema. Spread the change over two releases, as "
        f"CONTRIBUTING.md says under Migrations. If {released.version} is not released yet, run make released"
    )


@pytest.mark.parametrize("statement", BREAKING)
def test_a_planted_break_is_found(migrated: str, today: Schema, statement: str) -> None:
    found = breaks(today, changed(migrated, statement), allowed={})
    assert [one for one in found if one.startswith(BREAKING[statement])], found


@pytest.mark.parametrize("statement", HARMLESS)
def test_a_change_that_old_code_survives_is_none(migrated: str, today: Schema, statement: str) -> None:
    assert breaks(today, changed(migrated, statement), allowed={}) == []


def test_a_rule_that_the_old_code_keeps_to_can_be_allowed(migrated: str, today: Schema) -> None:
    new = changed(migrated, "ALTER TABLE jobs ADD CONSTRAINT seeds CHECK (seed IS NOT NULL)")
    assert breaks(today, new, allowed={"jobs.seeds": "seed is NOT NULL anyway"}) == []


def changed(url: str, statement: str) -> Schema:
    """The schema after one more statement, which is then undone."""
    with psycopg.connect(url) as connection:
        connection.execute(statement.encode())
        found = read(connection, VERSION)
        connection.rollback()
    return found
