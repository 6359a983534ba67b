"""The frozen base stays what it was, whatever is put on it and however it is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from shared.errors import TrainingFailed
from shared.schemas import Quantization
from worker.trainer import data, evaluate, model
from worker.trainer.batches import batches, trained_tokens
from worker.trainer.encoding import Encoder
from worker.trainer.methods import sft

from .conftest import MakeTask, WriteRows, quotes, recipe_of

LAYOUT = sft.Layout(packing=True, chunked=True, micro_batch=4, pad=2)


@pytest.mark.parametrize("folder", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("quantization", "kind"),
    [(Quantization.NF4, Linear4bit), (Quantization.INT8, Linear8bitLt), (Quantization.NONE, None)],
)
def test_base_is_held_as_asked(
    request: pytest.FixtureRequest, folder: str, quantization: Quantization, kind: type | None
) -> None:
    base = model.load_base(request.getfixturevalue(folder), quantization)
    quantized = [m for m in base.model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    assert all(type(m) is kind for m in quantized)
    assert bool(quantized) == (kind is not None)
    assert not any(p.requires_grad for p in base.model.parameters())
    if kind is Linear4bit:
        assert all(m.weight.quant_state.nested for m in quantized)


@pytest.mark.parametrize("folder", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", list(Quantization))
def test_gradients_after_an_evaluation_equal_those_before(
    request: pytest.FixtureRequest,
    folder: str,
    quantization: Quantization,
    make_task: MakeTask,
    write_rows: WriteRows,
    encoder: Encoder,
) -> None:
    """The CPU NF4 trap: bitsandbytes repacks weights at the first evaluation and loses the base path's gradients."""
    task = make_task(write_rows(quotes(8)))
    rows = data.load(task, encoder).train
    base = model.load_base(request.getfixturevalue(folder), quantization)
    adapted = model.put_on(base, recipe_of(task))

    def gradients() -> list[torch.Tensor]:
        adapted.zero_grad()
        for batch in batches(rows, packing=True, micro_batch=4, pad=2):
            with base.precision():
                loss = sft.loss(base.model, batch, LAYOUT)
            (loss.sum / trained_tokens(rows)).backward()
        return [p.grad.clone() for p in model.trainable(adapted).values() if p.grad is not None]

    before, random_before = gradients(), torch.get_rng_state()
    for adapter in (False, True):
        evaluate.score(base, adapted, rows, adapter=adapter, layout=LAYOUT)
    assert adapted.training
    assert torch.equal(torch.get_rng_state(), random_before)
    after = gradients()
    assert any(g.abs().max() > 0 for g in before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_adapter_is_fp32_on_every_linear_but_the_head(llama: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    base = model.load_base(llama, Quantization.NF4)
    adapted = model.put_on(base, recipe_of(make_task(write_rows(quotes(3)))))
    parameters = model.trainable(adapted)
    assert len(parameters) == 2 * 7 * 2
    assert all(p.dtype == torch.float32 for p in parameters.values())
    assert all("lora_" in name and "head" not in name for name in parameters)


def test_taken_off_leaves_the_base_as_it_was(llama: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    base = model.load_base(llama, Quantization.NF4)
    names = [name for name, _ in base.model.named_modules()]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = base.model(ids).logits
        model.take_off(model.put_on(base, recipe_of(make_task(write_rows(quotes(3))))))
        assert torch.equal(base.model(ids).logits, before)
    assert [name for name, _ in base.model.named_modules()] == names


def test_unknown_target_modules_are_named(llama: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    base = model.load_base(llama, Quantization.NONE)
    with pytest.raises(TrainingFailed, match="no_such_proj") as failed:
        model.put_on(base, recipe_of(make_task(write_rows(quotes(3)), lora={"target_modules": ["no_such_proj"]})))
    assert failed.value.param == "lora.target_modules"


@pytest.mark.parametrize("spoiled", ["config.json", "model.safetensors"])
def test_base_that_cannot_be_loaded_is_the_users_to_mend(llama: str, tmp_path: Path, spoiled: str) -> None:
    for path in Path(llama).iterdir():
        (tmp_path / path.name).write_bytes(b"{}" if path.name == spoiled else path.read_bytes())
    with pytest.raises(TrainingFailed) as failed:
        model.load_base(str(tmp_path), Quantization.NONE)
    assert failed.value.code == "unsupported_base_model"


def test_base_with_remote_code_is_refused(llama: str, tmp_path: Path) -> None:
    for path in Path(llama).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"llama"', '"unheard_of"')
    (tmp_path / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "code.Config"},', 1))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(TrainingFailed):
        model.load_base(str(tmp_path), Quantization.NONE)
