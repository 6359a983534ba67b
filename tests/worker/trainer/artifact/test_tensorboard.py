"""The event file can be read with the schema and checksums of another implementation, tensorboardX."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from shared.schemas.results import Metrics
from worker.trainer.artifact import tensorboard

STEPS = [
    Metrics(step=1, total_steps=300, train_loss=2.5, learning_rate=1e-4, trained_tokens=100, tokens_per_second=50),
    Metrics(step=1, total_steps=300, valid_loss=2.0, full_valid_loss=2.0, valid_reward_margin=-0.5),
    Metrics(step=300, total_steps=300, train_loss=1.25, grad_norm=0.5, trained_tokens=300, tokens_per_second=100),
]


def test_every_metric_is_read_back_with_its_group(tmp_path: Path) -> None:
    tensorboard.write(tmp_path / "runs" / "j", STEPS, ended=1000.0)
    first, *events = read(tmp_path / "runs" / "j" / tensorboard.NAME)
    assert first.file_version == "brain.Event:2"
    found = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in events]
    assert found == [
        (1, {"train/loss": 2.5, "train/learning_rate": pytest.approx(1e-4), "train/trained_tokens": 100,
             "train/tokens_per_second": 50}),
        (1, {"valid/loss": 2.0, "valid/reward_margin": -0.5}),
        (300, {"train/loss": 1.25, "train/grad_norm": 0.5, "train/trained_tokens": 300,
               "train/tokens_per_second": 100}),
    ]  # fmt: skip


def test_times_are_counted_back_from_the_end_by_the_time_of_optimizer_steps(tmp_path: Path) -> None:
    tensorboard.write(tmp_path / "r", STEPS, ended=1000.0)
    assert [event.wall_time for event in read(tmp_path / "r" / tensorboard.NAME)] == [996.0, 998.0, 998.0, 1000.0]


def test_a_run_without_metrics_has_a_file_without_scalars(tmp_path: Path) -> None:
    tensorboard.write(tmp_path / "r", [], ended=1000.0)
    assert [event.file_version for event in read(tmp_path / "r" / tensorboard.NAME)] == ["brain.Event:2"]


def read(path: Path) -> Iterator[Event]:
    """Read every record and check its checksums."""
    data, offset = path.read_bytes(), 0
    while offset < len(data):
        header, (length, crc) = data[offset : offset + 8], struct.unpack_from("<QI", data, offset)
        assert crc == masked_crc32c(header)
        payload = data[offset + 12 : offset + 12 + length]
        assert struct.unpack_from("<I", data, offset + 12 + length) == (masked_crc32c(payload),)
        offset += 16 + length
        yield Event.FromString(payload)
