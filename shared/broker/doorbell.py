"""The doorbell: `ring(queue)` wakes a worker of that queue. Postgres says what the work is.

Owns: the Celery configuration, for the API that rings and for the workers that listen. A lost, repeated, late or forged
ring changes nothing. So messages have no arguments, no results, no late acknowledgement and no retries.
Must not know jobs.
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
    """Return this process's Celery app: prefork pool, early acknowledgement, no prefetch.

    Of the ways to run Celery on Redis, this one neither delivers a message twice nor keeps it in a busy worker.
    docs/decisions/0001 says what the others did with tasks of an hour.
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
    """Wake one idle worker of this queue; False if the broker did not take the message (after about 4 s at most)."""
    try:
        celery_app().send_task(f"milliner.{queue}", queue=queue, ignore_result=True)
    except (OperationalError, RedisError, OSError) as error:
        log.warning("ring.failed", queue=queue, error=str(error))
        return False
    return True


class Bell:
    """Rings in a separate thread, so that a broker that hangs never delays a request.

    While one ring of a queue waits in this thread, further ones for that queue are dropped: one ring is enough, and the
    sweeper rings again for jobs that were missed.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bell")
        self._waiting: set[Queue] = set()
        self._lock = Lock()

    def ring(self, queue: Queue) -> None:
        """Ring as soon as the thread is free; returns at once."""
        with self._lock:
            if queue in self._waiting:
                return
            self._waiting.add(queue)
        self._thread.submit(self._ring, queue)

    def close(self) -> None:
        """Drop the rings that still wait. The sweeper will ring again."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ring(self, queue: Queue) -> None:
        with self._lock:
            self._waiting.discard(queue)
        ring(queue)
