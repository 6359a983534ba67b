"""Identifiers: a prefix that names the noun, then 48 bits of Unix milliseconds and 72 random bits, in hex.

They sort by time of creation (as UUIDv7, RFC 9562, does), so a page of any list is a range of its primary key.
"""

from __future__ import annotations

import secrets
import time


def new_id(prefix: str) -> str:
    """A fresh id such as `ftjob-019a3f…`; 30 hex digits after the prefix."""
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(9)}"


def fine_tuned_name(base: str, tenant: str, suffix: str | None, job_id: str) -> str:
    """What clients call the finished adapter: `ft:{base}:{org}:{suffix}:{id}`, as OpenAI names its own."""
    return f"ft:{base}:{tenant}:{suffix or ''}:{job_id.removeprefix('ftjob-')}"
