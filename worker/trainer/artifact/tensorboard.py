"""Write a run's metrics as a TensorBoard event file.

The format is simple enough to write by hand. A record is a length, a payload, and a masked CRC-32C of each. The payload
is a protobuf message, `Event`, of which scalars need four fields. The libraries for it bring a web server, or an S3
client into a process that must have none, and put host and time into the file's name (decision 6).
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/event.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from shared.schemas.results import Metrics

#: TensorBoard and the Hugging Face hub search all subfolders for names with `tfevents`. This name has neither host nor
#: time in it, so that another attempt overwrites the file.
NAME = "events.out.tfevents.milliner"
VERSION = "brain.Event:2"
CASTAGNOLI = 0x82F63B78
MASK = 0xA282EAD8
WORD = 0xFFFFFFFF


def write(folder: Path, metrics: list[Metrics], *, ended: float) -> None:
    """Write one event for each of `metrics`, in order. `ended` is the time of the last one, in Unix seconds.

    Times are counted back from there by the duration of the optimizer steps, so that pauses between two attempts do not
    appear in the curve.
    """
    folder.mkdir(parents=True)
    times = list(_seconds(metrics))
    began = ended - (times[-1] if times else 0.0)
    with (folder / NAME).open("wb") as file:
        file.write(_record(_double(1, began) + _bytes(3, VERSION.encode())))
        for seconds, measured in zip(times, metrics, strict=True):
            event = _double(1, began + seconds) + _integer(2, measured.step) + _bytes(5, _summary(measured.scalars()))
            file.write(_record(event))


def _seconds(metrics: list[Metrics]) -> Iterator[float]:
    seconds, tokens = 0.0, 0
    for measured in metrics:
        if measured.trained_tokens is not None and measured.tokens_per_second:
            seconds += (measured.trained_tokens - tokens) / measured.tokens_per_second
            tokens = measured.trained_tokens
        yield seconds


def _summary(scalars: Mapping[str, float]) -> bytes:
    values = (_bytes(1, tag.encode()) + _float(2, value) for tag, value in scalars.items())
    return b"".join(_bytes(1, value) for value in values)


# ---------------------------------------------------------------- protobuf's wire format: a key and the value. The key
# combines the field's number and the type of the value (0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Encode seven bits in a byte, lowest first; the eighth bit is set if more bytes follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# ---------------------------------------------------------------- records


def _record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + _checksum(length) + payload + _checksum(payload)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated by 15 bits plus a constant: a plain CRC over data that contains CRCs would be weak."""
    crc = WORD
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= WORD
    return struct.pack("<I", ((crc >> 15 | crc << 17) + MASK) & WORD)


def _table() -> Iterator[int]:
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (CASTAGNOLI if crc & 1 else 0)
        yield crc


_TABLE = tuple(_table())
