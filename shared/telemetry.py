"""Structured logs. An event is `noun.verb` with fields; job, attempt and worker are bound once, when the work starts.

Owns: the configuration of structlog, which gives us JSON lines for machines, coloured text for people, and context
variables for the bound fields.
"""

from __future__ import annotations

import logging
import sys

import structlog

from shared.settings import get_settings
from shared.streams import protect_standard_streams

log: structlog.stdlib.BoundLogger = structlog.get_logger()
bind = structlog.contextvars.bind_contextvars
unbind = structlog.contextvars.unbind_contextvars


def configure(process: str) -> None:
    """Send the logs of this process and its libraries to stderr. `process` is added to each event."""
    settings = get_settings()
    protect_standard_streams()
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]

    def name_process(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["process"] = process
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        name_process,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    render: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
        if settings.log_json
        else [structlog.dev.ConsoleRenderer()]
    )
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
