"""A Redis transport for Celery that ignores the content of messages: only their arrival counts.

Otherwise anyone who can write to the broker could crash workers again and again with a message that Celery cannot read,
or make one queue's workers run another queue's task. So each received message is replaced by the one that we would
send.
"""

from __future__ import annotations

import base64
from typing import Any
from uuid import uuid4

from kombu.transport import redis

from shared.telemetry import log


class Channel(redis.Channel):
    """A Redis channel that drops messages that cannot be decoded."""

    def _brpop_read(self, **options: Any) -> bool:
        try:
            return bool(super()._brpop_read(**options))  # type: ignore[misc]  # missing from kombu's types
        except (ValueError, RecursionError) as error:
            log.warning("message.dropped", error=repr(error)[:200])
            return True


class Transport(redis.Transport):
    """A Redis transport that delivers `ring_of(queue)` in place of each received message."""

    Channel = Channel

    def _deliver(self, message: Any, queue: str | None) -> None:
        super()._deliver(ring_of(str(queue)), queue)


def ring_of(queue: str) -> dict[str, Any]:
    """The message for this queue's task, without arguments, in Celery's message protocol 2.

    https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    return {
        "body": base64.b64encode(b"[[], {}, {}]").decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": f"milliner.{queue}", "id": str(uuid4())},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": str(uuid4()),
        },
    }
