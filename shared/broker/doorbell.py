"""The doorbell. `ring(queue)` says "there is work in this queue" and nothing else; Postgres says what the work is.

Owns the Celery configuration, for the side that rings and for the side that listens. A lost, repeated, late or forged
ring changes nothing, so there is no result backend, no late ack, no retry, and no argument.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from shared.broker.queues import Queue
from shared.settings import get_settings
from shared.telemetry import log


@lru_cache(maxsize=1)
def celery_app() -> Celery:
    """Prefork, early ack, no prefetch: of the profiles of Celery on Redis, the one that neither doubles nor hides.

    docs/decisions/0001 tells what the others did to hour-long tasks.
    """
    app = Celery("milliner", broker=get_settings().redis_url.get_secret_value())
    app.conf.update(
        broker_transport="shared.broker.transport:Transport",
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_serializer="json",
        accept_content=["json"],
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": "milliner:",
            "socket_timeout": 2,
            "socket_connect_timeout": 2,
            "visibility_timeout": 3600,
        },
        task_publish_retry=False,
        task_create_missing_queues=True,
    )
    return app


def ring(queue: Queue) -> bool:
    """Tell one idle worker of this queue to look; False if the broker did not take it (at most some 4 s later)."""
    try:
        celery_app().send_task(f"milliner.{queue}", queue=queue, ignore_result=True)
    except (OperationalError, RedisError, OSError) as error:
        log.warning("queue.unreachable", queue=queue, error=str(error))
        return False
    return True


class Bell:
    """Rings from a thread of its own, so that a frozen broker never holds up a request.

    While one ring of a queue waits its turn, further ones are dropped: the sweeper finds rows nobody was told of.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bell")
        self._waiting: set[Queue] = set()
        self._lock = Lock()

    def ring(self, queue: Queue) -> None:
        """Ring soon."""
        with self._lock:
            if queue in self._waiting:
                return
            self._waiting.add(queue)
        self._thread.submit(self._ring, queue)

    def close(self) -> None:
        """Drop what still waits; the sweeper will ring for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ring(self, queue: Queue) -> None:
        with self._lock:
            self._waiting.discard(queue)
        ring(queue)
