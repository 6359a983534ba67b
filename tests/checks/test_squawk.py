"""squawk finds nothing in a migration that would block a live database, except the exceptions listed here.

Each migration is rendered as SQL by `alembic upgrade A:B --sql`, which needs no database.
"""

from __future__ import annotations

import io
import json
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from tests.checks.migrating import INI

ROOT = Path(__file__).resolve().parents[2]
REVISIONS = {
    script.revision: script.down_revision for script in ScriptDirectory.from_config(Config(INI)).walk_revisions()
}

UNRELEASED = "no released version has rows in this table"
#: The reason why a migration may break a rule of squawk, by revision and rule.
EXCEPTIONS = {
    ("0001", "prefer-text-field"): "alembic_version is Alembic's own table",
    ("0003", "constraint-missing-not-valid"): UNRELEASED,
    ("0003", "require-concurrent-index-creation"): UNRELEASED,
    ("0004", "renaming-column"): UNRELEASED,
}


class Finding(NamedTuple):
    rule: str
    line: str
    message: str


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_migration_does_not_block_other_queries(revision: str) -> None:
    found = squawk(rendered(f"{REVISIONS[revision] or 'base'}:{revision}"))
    assert [one for one in found if (revision, one.rule) not in EXCEPTIONS] == []
    listed = {rule for name, rule in EXCEPTIONS if name == revision}
    assert listed <= {one.rule for one in found}, "an entry of EXCEPTIONS is not needed any more"


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("ALTER TABLE jobs ADD COLUMN colour text NOT NULL", "adding-required-field"),
        ("ALTER TABLE jobs ALTER COLUMN phase SET NOT NULL", "adding-not-nullable-field"),
        ("ALTER TABLE jobs ALTER COLUMN phase TYPE bigint USING 0", "changing-column-type"),
        ("ALTER TABLE jobs RENAME COLUMN phase TO stage", "renaming-column"),
        ("ALTER TABLE jobs DROP COLUMN phase", "ban-drop-column"),
        ("ALTER TABLE jobs ADD CONSTRAINT ck CHECK (seed > 0)", "constraint-missing-not-valid"),
        ("CREATE INDEX ix ON jobs (seed)", "require-concurrent-index-creation"),
    ],
)
def test_a_planted_fault_is_found(statement: str, rule: str) -> None:
    harmless = rendered("0001:0002")
    assert squawk(harmless) == []
    assert rule in {one.rule for one in squawk(harmless.replace("COMMIT;", f"{statement};\nCOMMIT;"))}


def test_a_migration_has_a_lock_timeout() -> None:
    sql = rendered("0001:0002")
    assert {one.rule for one in squawk(sql.replace("SET LOCAL lock_timeout", "-- "))} == {"require-lock-timeout"}


def rendered(revisions: str) -> str:
    """The SQL of an upgrade."""
    out = io.StringIO()
    command.upgrade(Config(INI, output_buffer=out), revisions, sql=True)
    return out.getvalue()


def squawk(sql: str) -> list[Finding]:
    program = Path(sysconfig.get_path("scripts"), "squawk")
    done = subprocess.run(
        [program, "--config", ROOT / ".squawk.toml", "--reporter", "json"],
        input=sql,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    lines = sql.splitlines()
    return [Finding(one["rule_name"], lines[one["line"]], one["message"]) for one in json.loads(done.stdout)]
