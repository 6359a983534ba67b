"""The event file, read back by the schema and the checksum of a library that writes them too (tensorboardX)."""

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


def test_every_number_comes_back_under_a_group(tmp_path: Path) -> None:
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


def test_time_is_that_of_optimizer_steps_counted_back_from_the_end(tmp_path: Path) -> None:
    tensorboard.write(tmp_path / "r", STEPS, ended=1000.0)
    assert [event.wall_time for event in read(tmp_path / "r" / tensorboard.NAME)] == [996.0, 998.0, 998.0, 1000.0]


def test_a_run_that_measured_nothing_has_an_empty_file(tmp_path: Path) -> None:
    tensorboard.write(tmp_path / "r", [], ended=1000.0)
    assert [event.file_version for event in read(tmp_path / "r" / tensorboard.NAME)] == ["brain.Event:2"]


def read(path: Path) -> Iterator[Event]:
    """Every record, its checksums compared."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        header, (length, crc) = data[at : at + 8], struct.unpack_from("<QI", data, at)
        assert crc == masked_crc32c(header)
        payload = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 12 + length) == (masked_crc32c(payload),)
        at += 16 + length
        yield Event.FromString(payload)
