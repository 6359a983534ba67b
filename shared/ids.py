"""Ids and model names.

Owns: their formats. An id is a prefix that names the kind of object, then 48 bits of Unix milliseconds and 72 random
bits, in hex. Ids sort by creation time, like UUIDv7 (RFC 9562), so a page of any list is a range of its primary key.
"""

from __future__ import annotations

import secrets
import time


def new_id(prefix: str) -> str:
    """Return a new id such as `ftjob-019a3f…`: the prefix and 30 hex digits."""
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(9)}"


def fine_tuned_name(base: str, tenant: str, suffix: str | None, job_id: str) -> str:
    """Return the name of a job's fine-tuned model, in the form that OpenAI uses: `ft:{base}:{org}:{suffix}:{id}`."""
    return f"ft:{base}:{tenant}:{suffix or ''}:{job_id.removeprefix('ftjob-')}"
