"""Make memory run out: a base with large activations, a limit on a process, a loss that fails on demand."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import tiny_tokenizer
from tests.worker.trainer.conftest import Observer
from worker.trainer.forward.batches import Batch
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import Loss, sft
from worker.trainer.protocol import Notice


def wide_base(folder: Path, *, positions: int = 256) -> str:
    """A base with few parameters and large activations."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=16384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def limit_data(pid: int, *, megabytes: int | None) -> None:
    """Allow a process so many megabytes more than it has now; None removes the limit."""
    status = Path(f"/proc/{pid}/status").read_text()
    current = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData:"))) * 1024
    soft = resource.RLIM_INFINITY if megabytes is None else current + megabytes * 1024**2
    resource.prlimit(pid, resource.RLIMIT_DATA, (soft, resource.RLIM_INFINITY))


class Failing:
    """Makes `sft.loss` raise MemoryError for batches for which `when` is true, with its activations in the frame.

    `calls` counts the calls with gradients.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Any) -> None:
        self.calls = 0
        original = sft.loss

        def loss(base: Any, batch: Batch, layout: Layout) -> Loss:
            self.calls += torch.is_grad_enabled()
            found = original(base, batch, layout)
            if when(batch):
                raise MemoryError
            return found

        monkeypatch.setattr(sft, "loss", loss)


def warnings_of(observer: Observer) -> list[str]:
    return [notice.message for notice in observer.of(Notice) if notice.level == "warn"]
