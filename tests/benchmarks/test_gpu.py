"""The GPU benchmark runs with a tiny shape on a CPU; no figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from shared.estimation import architecture


def test_quick_run_writes_every_case(tmp_path: Path) -> None:
    assert gpu.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["results"]) == len(gpu.CASES)
    assert all(one["tokens_per_second"] > 0 for one in found["results"])
    assert "| tiny | nf4, 2 x 64 packed |" in (tmp_path / "gpu.md").read_text()


def test_shapes_have_the_sizes_of_their_models() -> None:
    """The model cards say 8.03 and 7.62 billion."""
    sizes = {name: architecture.read_config(shape).total for name, shape in gpu.SHAPES.items()}
    assert sizes == {"Llama-3.1-8B": 8_030_261_248, "Qwen2.5-7B": 7_615_616_512}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so the benchmark would run")
def test_a_missing_device_is_reported() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])
