"""Device names and sizes, and peak memory since the last reset."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.schemas.memory import Device, Weighing
from tests.worker.trainer.conftest import ROOT, MakeTask, WriteRows, quotes, run
from worker.trainer.protocol import Done
from worker.trainer.system import device, peak_memory

MB = 10**6


def test_peak_is_measured_since_begin() -> None:
    peak_memory.begin()
    before = peak_memory.process_peak()
    block = torch.ones(64 * MB // 4)
    held = peak_memory.process_peak()
    assert held - before > 60 * MB
    del block
    assert peak_memory.process_peak() > held - 10 * MB  # the kernel counts in batches
    peak_memory.begin()
    assert peak_memory.process_peak() < held - 30 * MB


def test_a_run_reports_predicted_and_measured_memory(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    here = device.cpu(memory_bytes=0)
    half = Weighing(computed_bytes=10**9, measured_bytes=5 * 10**8)
    task = make_task(
        write_rows(quotes(24)),
        devices=[here.model_dump() | {"weighings": [half]}],
        hyperparameters={"batch_size": 4},
        trainer={"max_steps": 2, "packing": False, "micro_batch": 4},
    )
    report = run(task, tmp_path).of(Done)[0].report
    fit = report.fit
    assert fit is not None
    assert fit.device == here
    assert (fit.rows, fit.rehearsed_bytes) == (4, None)
    assert fit.length > 10
    assert fit.predicted_bytes == pytest.approx(fit.computed_bytes / 2, abs=1)
    assert fit.measured_bytes > 100 * MB
    assert report.peak_memory_bytes >= fit.measured_bytes


@pytest.mark.parametrize(("written", "limit"), [("max", None), ("2000000000", 2_000_000_000)])
def test_a_containers_memory_is_its_cgroup_limit(tmp_path: Path, written: str, limit: int | None) -> None:
    proc, group = tmp_path / "proc", tmp_path / "cgroup" / "box"
    (proc / "self").mkdir(parents=True)
    group.mkdir(parents=True)
    (proc / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast One\n")
    (proc / "self" / "cgroup").write_text("0::/box\n")
    (group / "memory.max").write_text(f"{written}\n")
    whole_machine = device.cpu(memory_bytes=0).memory_bytes
    found = device.cpu(memory_bytes=0, proc=proc, cgroups=tmp_path / "cgroup")
    assert found.name == "A Fast One"
    assert found.memory_bytes == (limit or max(found.memory_bytes, whole_machine))
    assert device.cpu(memory_bytes=7, proc=proc, cgroups=tmp_path / "cgroup").memory_bytes == 7


def test_the_device_is_printed_as_json() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "worker.trainer.system.device", "5000"], cwd=ROOT, capture_output=True, check=True
    )
    assert Device.model_validate_json(printed.stdout).memory_bytes == 5000
