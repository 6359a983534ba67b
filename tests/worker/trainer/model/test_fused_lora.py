"""The fused LoRA layer gives the results and gradients of PEFT's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from shared.schemas.requests import Quantization
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes, recipe_of
from worker.trainer.model import fused_lora
from worker.trainer.model.base import Attachment, Base, attach, detach, load_base, trainable

MakeAdapted = Callable[..., tuple[Base, PeftModel]]


@pytest.fixture
def make_adapted(llama: str, make_task: MakeTask, write_rows: WriteRows) -> MakeAdapted:
    def make(quantization: Quantization, dtype: torch.dtype, **settings: Any) -> tuple[Base, PeftModel]:
        torch.manual_seed(0)
        base = load_base(llama, quantization, compute_dtype=dtype)
        adapted = attach(base, recipe_of(make_task(write_rows(quotes(3)), lora=settings))).adapted
        for parameter in trainable(adapted).values():
            torch.nn.init.normal_(parameter, std=0.05)
        return base, adapted

    return make


def logits_and_gradients(base: Base, adapted: PeftModel) -> list[torch.Tensor]:
    """The logits of a batch, then the adapter's gradients."""
    ids = torch.arange(96).view(4, 24)
    adapted.zero_grad()
    with base.precision():
        logits = base.model(input_ids=ids, use_cache=False).logits.float()
    torch.autograd.backward(logits.logsumexp(-1).sum())
    tensors = [logits.detach()]
    for parameter in trainable(adapted).values():
        assert parameter.grad is not None
        tensors.append(parameter.grad.clone())
    return tensors


def fused(adapted: PeftModel) -> list[LoraLayer]:
    return [module for module in adapted.modules() if isinstance(module, LoraLayer) and "forward" in vars(module)]


def unfuse(adapted: PeftModel) -> None:
    for module in fused(adapted):
        del module.forward


@pytest.mark.parametrize("resident", [0, 1 << 20], ids=["dequantized at each use", "resident"])
@pytest.mark.parametrize("quantization", [Quantization.NF4, Quantization.NONE])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_equals_pefts_forward_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    make_adapted: MakeAdapted,
    quantization: Quantization,
    dtype: torch.dtype,
    tolerance: float,
    resident: int,
) -> None:
    monkeypatch.setattr(fused_lora, "RESIDENT_BYTES", resident)
    base, adapted = make_adapted(quantization, dtype, alpha=24)
    assert len(fused(adapted)) == 2 * 7
    ours = logits_and_gradients(base, adapted)
    unfuse(adapted)
    for one, other in zip(ours, logits_and_gradients(base, adapted), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_resident_matrices_equal_those_of_bitsandbytes_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, make_adapted: MakeAdapted
) -> None:
    base, adapted = make_adapted(Quantization.NF4, torch.bfloat16)
    resident = logits_and_gradients(base, adapted)
    unfuse(adapted)
    monkeypatch.setattr(fused_lora, "RESIDENT_BYTES", 0)
    fused_lora.fuse(adapted)
    dequantized = logits_and_gradients(base, adapted)
    assert all(torch.equal(one, other) for one, other in zip(resident, dequantized, strict=True))


def test_without_the_adapter_logits_are_those_of_the_base(make_adapted: MakeAdapted) -> None:
    base, adapted = make_adapted(Quantization.NF4, torch.bfloat16)
    ids = torch.arange(12)[None]
    with torch.no_grad(), base.precision():
        with adapted.disable_adapter():
            off = base.model(ids).logits
        assert not torch.equal(base.model(ids).logits, off)
        detach(Attachment(adapted, heads={}, dropouts=[]))
        assert torch.equal(base.model(ids).logits, off)
    assert not any("forward" in vars(module) for module in base.model.modules() if isinstance(module, Linear4bit))


def test_in_evaluation_logits_equal_pefts_bit_for_bit(make_adapted: MakeAdapted) -> None:
    """So a published score is the one that any user of the adapter gets."""
    base, adapted = make_adapted(Quantization.NF4, torch.bfloat16)
    adapted.eval()
    ids = torch.arange(96).view(4, 24)
    with torch.no_grad(), base.precision():
        ours = base.model(ids).logits
        unfuse(adapted)
        assert torch.equal(base.model(ids).logits, ours)


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_dora_keep_pefts_forward(make_adapted: MakeAdapted, settings: dict[str, Any]) -> None:
    _, adapted = make_adapted(Quantization.NONE, torch.float32, **settings)
    assert fused(adapted) == []


def test_int8_keeps_pefts_forward(make_adapted: MakeAdapted) -> None:
    _, adapted = make_adapted(Quantization.INT8, torch.bfloat16)
    assert fused(adapted) == []


def test_resident_bytes_limit_what_stays_dequantized(
    monkeypatch: pytest.MonkeyPatch, make_adapted: MakeAdapted
) -> None:
    _, adapted = make_adapted(Quantization.NF4, torch.bfloat16)
    unfuse(adapted)
    monkeypatch.setattr(fused_lora, "RESIDENT_BYTES", 40_000)
    fused_lora.fuse(adapted)
    resident = [module.forward.args[1] for module in fused(adapted)]
    assert 0 < sum(matrix.nbytes for matrix in resident if matrix is not None) <= 40_000
    assert any(matrix is None for matrix in resident)
