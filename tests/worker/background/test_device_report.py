"""A slot's device: detected in its own process and stored in the table."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from shared.database import devices
from shared.database.session import session_scope
from shared.schemas.requests import Quantization
from shared.settings import get_settings
from worker.background import device_report
from worker.trainer.system import device


def test_a_slot_detects_the_device_of_its_trainers(as_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLINER_DEVICE_MEMORY_BYTES", "4000000000")
    get_settings.cache_clear()
    found = device_report.detect_device(0)
    assert found.memory_bytes == 4_000_000_000
    if found.kind == "cpu":
        assert found.name == device.cpu(memory_bytes=0).name


def test_a_reported_device_is_known(as_worker: None) -> None:
    device_report.start(0).join(timeout=60)
    with session_scope() as session:
        known = devices.known(session, digest="d", quantization=Quantization.NF4)
        session.execute(text("TRUNCATE devices"))
    assert device_report.detect_device(0).model_dump() in [one.model_dump(exclude={"weighings"}) for one in known]
