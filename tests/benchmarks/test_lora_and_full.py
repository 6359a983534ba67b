"""The comparison runs on a tiny base; no figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import lora_and_full
from tests.tiny import tiny_llama


def test_quick_run_writes_figures_and_a_table(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base")
    assert lora_and_full.main(["--quick", "--base", str(tmp_path / "base"), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "lora_and_full.json").read_text())
    lora, full = found["runs"].values()
    assert lora["base_loss"] == pytest.approx(full["base_loss"], rel=1e-4)
    assert lora["trained_tokens"] == full["trained_tokens"]
    assert full["learning_rate"] < lora["learning_rate"]
    assert lora["trainable_parameters"] < full["trainable_parameters"] == full["total_parameters"]
    assert "(100.00%)" in (tmp_path / "lora_and_full.md").read_text()
