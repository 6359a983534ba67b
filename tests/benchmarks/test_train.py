"""The benchmark runs on a tiny base without the peer; no figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import machine, train
from tests.tiny import tiny_llama


def test_quick_run_writes_figures_and_a_table(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base")
    assert train.main(["--quick", "--base", str(tmp_path / "base"), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "train.json").read_text())
    (ours,) = found["runs"]
    assert (ours["contender"], ours["steps"]) == ("ours", 2)
    assert ours["trained_tokens"] > 0 < ours["peak_bytes"]
    assert set(found["heldout_loss"]) == {"base", "ours"}
    assert found["machine"]["cores"] >= 1
    assert f"torch {machine.versions()['torch']}" in (tmp_path / "train.md").read_text()


def test_table_compares_ours_with_the_goal() -> None:
    run = {"steps": 1, "to_first_step": 9.0, "trained_tokens": 1000}
    found: dict[str, Any] = {
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python -m benchmarks.train",
        "machine": {"cpu": "a CPU", "cores": 2, "flags": [], "load_before": 0.0, "bf16_gemm_flops": 10**12},
        "versions": {},
        "base": "tiny",
        "flop_per_token": 5 * 10**8,
        "heldout_loss": {"base": 4.0, "ours": 3.0, "TRL packed": 3.0},
        "runs": [
            run | {"contender": "ours", "seconds": 1.0, "peak_bytes": 2 * 10**9},
            run | {"contender": "TRL packed", "seconds": 4.0, "peak_bytes": 4 * 10**9},
        ],
    }
    assert "| ours | 1,000 | 50% | 2.00 GB | 9.0 s | 3.0000 |" in train.table(found)
    assert "4.00 times as fast (bar: 3), 0.50 of its memory (0.8), loss +0.00%" in train.table(found)
    assert train.table(found).endswith(": passed.\n")
    found["heldout_loss"] |= {"ours": 3.1}
    assert train.table(found).endswith(": not passed.\n")
