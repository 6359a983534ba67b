"""The fused LoRA layer against PEFT's own forward."""

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
from worker.trainer.model.base import Base, attach, detach, load_base, trainable

PutOn = Callable[..., tuple[Base, PeftModel]]


@pytest.fixture
def put_on(llama: str, make_task: MakeTask, write_rows: WriteRows) -> PutOn:
    def make(quantization: Quantization, dtype: torch.dtype, **settings: Any) -> tuple[Base, PeftModel]:
        torch.manual_seed(0)
        base = load_base(llama, quantization, compute_dtype=dtype)
        adapted = attach(base, recipe_of(make_task(write_rows(quotes(3)), lora=settings))).adapted
        for parameter in trainable(adapted).values():
            torch.nn.init.normal_(parameter, std=0.05)
        return base, adapted

    return make


def found(base: Base, adapted: PeftModel) -> list[torch.Tensor]:
    """Logits of a batch, and the adapter's gradients."""
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
    put_on: PutOn,
    quantization: Quantization,
    dtype: torch.dtype,
    tolerance: float,
    resident: int,
) -> None:
    monkeypatch.setattr(fused_lora, "RESIDENT_BYTES", resident)
    base, adapted = put_on(quantization, dtype, alpha=24)
    assert len(fused(adapted)) == 2 * 7
    ours = found(base, adapted)
    unfuse(adapted)
    for one, other in zip(ours, found(base, adapted), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_resident_matrices_are_those_of_bitsandbytes_to_the_bit(monkeypatch: pytest.MonkeyPatch, put_on: PutOn) -> None:
    base, adapted = put_on(Quantization.NF4, torch.bfloat16)
    with_them = found(base, adapted)
    unfuse(adapted)
    monkeypatch.setattr(fused_lora, "RESIDENT_BYTES", 0)
    fused_lora.fuse(adapted)
    assert all(torch.equal(one, other) for one, other in zip(with_them, found(base, adapted), strict=True))


def test_with_the_adapter_off_the_base_is_heard(put_on: PutOn) -> None:
    base, adapted = put_on(Quantization.NF4, torch.bfloat16)
    ids = torch.arange(12)[None]
    with torch.no_grad(), base.precision():
        with adapted.disable_adapter():
            off = base.model(ids).logits
        assert not torch.equal(base.model(ids).logits, off)
        detach(adapted)
        assert torch.equal(base.model(ids).logits, off)
    assert not any("forward" in vars(module) for module in base.model.modules() if isinstance(module, Linear4bit))


def test_a_score_is_pefts_own_to_the_bit(put_on: PutOn) -> None:
    """What is published was measured as any reader of the adapter would."""
    base, adapted = put_on(Quantization.NF4, torch.bfloat16)
    adapted.eval()
    ids = torch.arange(96).view(4, 24)
    with torch.no_grad(), base.precision():
        ours = base.model(ids).logits
        unfuse(adapted)
        assert torch.equal(base.model(ids).logits, ours)


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"use_dora": True}])
def test_what_is_no_plain_lora_is_left_to_peft(put_on: PutOn, settings: dict[str, Any]) -> None:
    _, adapted = put_on(Quantization.NONE, torch.float32, **settings)
    assert fused(adapted) == []


def test_int8_is_left_to_peft(put_on: PutOn) -> None:
    _, adapted = put_on(Quantization.INT8, torch.bfloat16)
    assert fused(adapted) == []


def test_room_bounds_what_stays_dequantized(monkeypatch: pytest.MonkeyPatch, put_on: PutOn) -> None:
    _, adapted = put_on(Quantization.NF4, torch.bfloat16)
    unfuse(adapted)
    monkeypatch.setattr(fused_lora, "RESIDENT_BYTES", 40_000)
    fused_lora.fuse(adapted)
    held = [module.forward.args[1] for module in fused(adapted)]
    assert 0 < sum(matrix.nbytes for matrix in held if matrix is not None) <= 40_000
    assert any(matrix is None for matrix in held)
