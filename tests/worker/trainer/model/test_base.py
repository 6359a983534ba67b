"""The frozen base stays unchanged, whatever is attached to it and however it is scored."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

from shared.errors import TrainingFailed
from shared.schemas.requests import Quantization
from tests.worker.trainer.conftest import MakeTask, WriteRows, quotes, recipe_of
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation import evaluate
from worker.trainer.forward.batches import batches, trained_tokens
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import sft
from worker.trainer.model import adapter_weights
from worker.trainer.model.base import attach, detach, load_base, trainable

LAYOUT = Layout(packing=True, chunked=True, micro_batch=4, pad=2)


@pytest.mark.parametrize("folder", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("quantization", "kind"),
    [(Quantization.NF4, Linear4bit), (Quantization.INT8, Linear8bitLt), (Quantization.NONE, None)],
)
def test_base_is_loaded_in_the_requested_quantization(
    request: pytest.FixtureRequest, folder: str, quantization: Quantization, kind: type | None
) -> None:
    base = load_base(request.getfixturevalue(folder), quantization)
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
    """On CPUs bitsandbytes repacks NF4 weights at the first evaluation, which loses the gradients through the base."""
    task = make_task(write_rows(quotes(8)))
    rows = dataset.load(task, encoder).train
    base = load_base(request.getfixturevalue(folder), quantization)
    recipe = recipe_of(task)
    adapted = attach(base, recipe).adapted

    def gradients() -> list[torch.Tensor]:
        adapted.zero_grad()
        for batch in batches(rows, packing=True, micro_batch=4, pad=2):
            with base.precision():
                loss = sft.loss(base.model, batch, LAYOUT)
            torch.autograd.backward(loss.sums.sum() / trained_tokens(rows))
        return [p.grad.clone() for p in trainable(adapted).values() if p.grad is not None]

    before, random_before = gradients(), torch.get_rng_state()
    for adapter in (False, True):
        evaluate.score(base, adapted, rows, recipe, adapter=adapter, layout=LAYOUT)
    assert adapted.training
    assert torch.equal(torch.get_rng_state(), random_before)
    after = gradients()
    assert any(g.abs().max() > 0 for g in before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_adapter_is_fp32_on_every_linear_but_the_head(llama: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    base = load_base(llama, Quantization.NF4)
    adapted = attach(base, recipe_of(make_task(write_rows(quotes(3))))).adapted
    parameters = trainable(adapted)
    assert len(parameters) == 2 * 7 * 2
    assert all(p.dtype == torch.float32 for p in parameters.values())
    assert all("lora_" in name and "head" not in name for name in parameters)


def test_detach_leaves_the_base_as_it_was(llama: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    base = load_base(llama, Quantization.NF4)
    names = [name for name, _ in base.model.named_modules()]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = base.model(ids).logits
        detach(attach(base, recipe_of(make_task(write_rows(quotes(3))))))
        assert torch.equal(base.model(ids).logits, before)
    assert [name for name, _ in base.model.named_modules()] == names


def test_unknown_target_modules_are_named(llama: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    base = load_base(llama, Quantization.NONE)
    with pytest.raises(TrainingFailed, match="no_such_proj") as failed:
        attach(base, recipe_of(make_task(write_rows(quotes(3)), lora={"target_modules": ["no_such_proj"]})))
    assert failed.value.param == "lora.target_modules"


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "v_porj"], "v_porj"),
        (["q_proj", "lm_head"], "lm_head"),
        (["embed_tokens"], "embed_tokens"),
        (["q_proj", "self_attn"], "self_attn"),
    ],
)
def test_unsupported_targets_are_refused_and_the_base_is_unchanged(
    llama: str, make_task: MakeTask, write_rows: WriteRows, targets: list[str], named: str
) -> None:
    base = load_base(llama, Quantization.NONE)
    with pytest.raises(TrainingFailed, match=named) as failed:
        attach(base, recipe_of(make_task(write_rows(quotes(3)), lora={"target_modules": targets})))
    assert (failed.value.code, failed.value.param) == ("invalid_lora", "lora.target_modules")
    assert not any("lora" in name for name, _ in base.model.named_modules())


def test_adapter_never_contains_an_embedding(llama: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    """PEFT adds embeddings on its own, for instance if the vocabulary size differs from that of the base's folder."""
    base = load_base(llama, Quantization.NONE)
    adapted = attach(base, recipe_of(make_task(write_rows(quotes(3)), lora={"target_modules": ["q_proj"]}))).adapted
    base.model.config.vocab_size += 1
    assert {name.split(".")[-2] for name in adapter_weights.adapter_tensors(adapted)} == {"lora_A", "lora_B"}


def test_base_without_sdpa_is_loaded(tmp_path: Path) -> None:
    """Transformers refuses `attn_implementation="sdpa"` for some models, and chooses it on its own for the others."""
    torch.manual_seed(0)
    GPTJForCausalLM(GPTJConfig(vocab_size=320, n_embd=64, n_layer=1, n_head=4, rotary_dim=8)).save_pretrained(tmp_path)
    assert load_base(str(tmp_path), Quantization.NONE).model.config.model_type == "gptj"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.AcceleratorError("CUDA error: device lost"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.ESTALE, "Stale file handle"),
        ImportError("libcudart.so.13: cannot open shared object file"),
    ],
)
def test_machine_that_fails_while_loading_is_not_the_users_fault(
    llama: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object, **options: object) -> NoReturn:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)) as failed:
        load_base(llama, Quantization.NONE)
    assert failed.value is error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_base_that_the_machine_cannot_read_is_not_the_users_fault(unreadable: Callable[[str], str], name: str) -> None:
    with pytest.raises(OSError, match=r"Errno 5|os error"):
        load_base(unreadable(name), Quantization.NONE)


def test_base_in_an_unsupported_quantization_is_the_users_error(llama: str, tmp_path: Path) -> None:
    for path in Path(llama).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingFailed, match="compressed-tensors") as failed:
        load_base(str(tmp_path), Quantization.NF4)
    assert failed.value.code == "unsupported_base_model"
    assert isinstance(failed.value.__cause__, ImportError)


@pytest.mark.parametrize("spoiled", ["config.json", "model.safetensors"])
def test_base_that_cannot_be_loaded_is_the_users_error(llama: str, tmp_path: Path, spoiled: str) -> None:
    for path in Path(llama).iterdir():
        (tmp_path / path.name).write_bytes(b"{}" if path.name == spoiled else path.read_bytes())
    with pytest.raises(TrainingFailed) as failed:
        load_base(str(tmp_path), Quantization.NONE)
    assert failed.value.code == "unsupported_base_model"


def test_base_that_lacks_a_weight_is_refused(llama: str, tmp_path: Path) -> None:
    """Otherwise training would continue with random numbers in its place."""
    shutil.copytree(llama, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TrainingFailed, match=r"lack 1 of its weights, such as model\.layers\.1\.mlp\.down_proj"
    ) as failed:
        load_base(str(tmp_path / "base"), Quantization.NF4)
    assert failed.value.code == "unsupported_base_model"


def test_base_with_remote_code_is_refused(llama: str, tmp_path: Path) -> None:
    for path in Path(llama).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"llama"', '"unheard_of"')
    (tmp_path / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "code.Config"},', 1))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(TrainingFailed):
        load_base(str(tmp_path), Quantization.NONE)
