"""The frozen base and the adapter on it.

Owns: loading a base at a quantization, closing bitsandbytes' CPU trap, putting a LoRA on, or weights of its own to be
trained (`whole.py`), and taking them off.
Must not run remote code, reach the network, or change a frozen weight: the base may serve the next job.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from shared.errors import TrainingFailed
from shared.schemas.requests import Quantization
from shared.schemas.results import Recipe
from worker.trainer.model import classification_head, fused_lora, short_attention
from worker.trainer.model.full_weights import Adapted, FullWeights
from worker.trainer.system import free_memory
from worker.trainer.system.resource_errors import is_kernel_error, is_out_of_memory


@dataclass(frozen=True, slots=True)
class Base:
    """A resident base model. `compute_dtype` is what its matrix products run in; losses and adapters stay fp32.

    `stored_dtype` is that of its files. A classifier has a `head`, the paths of its modules, of which the files are
    without the parameters `blank`.
    """

    model: PreTrainedModel
    device: torch.device
    compute_dtype: torch.dtype
    stored_dtype: torch.dtype = torch.float32
    head: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast for adapters in fp32 on a bf16 base: bf16 adapters would lose small updates."""
        # Its cache of cast weights is of all threads, and is emptied by whichever leaves first.
        enabled = self.compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=enabled, cache_enabled=False):
            yield


def load_base(
    base_dir: str,
    quantization: Quantization,
    *,
    labels: Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Base:
    """Load safetensors as they are or quantized on the fly, computing in bf16 where the machine is fast at it.

    With `labels` it is a classifier's; what the files are without of its head is yet to be drawn.
    Raises TrainingFailed if the folder holds no usable model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype or (torch.bfloat16 if _fast_bfloat16(device) else torch.float32)
    try:
        model, loading = (AutoModelForSequenceClassification if labels else AutoModelForCausalLM).from_pretrained(
            base_dir,
            # Another classifier's head may have another width, which is drawn anew; any other misfit is refused below.
            **({"num_labels": len(labels), "ignore_mismatched_sizes": True} if labels else {}),
            quantization_config=_quantization_config(
                quantization, dtype, skipped=classification_head.unquantized(base_dir) if labels else None
            ),
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        # RuntimeError is left alone: that is how torch reports an accelerator or a memory that failed.
        if is_out_of_memory(error) or is_kernel_error(error):
            raise
        if isinstance(error, ImportError) and not _is_quantized(base_dir):
            raise  # this machine's bitsandbytes or CUDA is broken
        raise TrainingFailed(
            f"the base model cannot be loaded as {quantization.value}: {error}",
            code="unsupported_base_model",
            param="model",
            hint="choose another base or quantization; `milliner models` lists what is imported",
        ) from error
    blank = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    head = classification_head.head(model, blank) if labels else ()
    if labels is not None and classification_head.means_other(model.config, labels):
        outputs = {name for name, parameter in model.named_parameters() if len(parameter) == len(labels)}
        blank |= {name for name in outputs if classification_head.is_of(name, head)}
    if absent := sorted(name for name in blank if not classification_head.is_of(name, head)):
        # transformers fills what is not there with random numbers, and goes on.
        raise TrainingFailed(
            f"the base model's files lack {len(absent)} of its weights, such as {absent[0]}",
            code="unsupported_base_model",
            param="model",
            hint="import the whole model again" + ("" if labels else ", or one that generates text"),
        )
    for path in head:
        model.get_submodule(path).float()
    close_nf4_trap(model)
    short_attention.use(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    if device.type == "cpu" and quantization is not Quantization.NONE:
        release_mapped_files(model)
    free_memory.free()  # of SmolLM2-135M's matrices as they were, it has kept half a gigabyte
    return Base(model, device, dtype, _stored_type(base_dir), head, tuple(sorted(blank)))


def close_nf4_trap(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on AVX512-BF16 machines.

    It does so at the first no-grad forward in eval mode, and never undoes it: after one evaluation, training loses the
    base path's gradients (LoRA gradients 87 % wrong, loss unchanged).
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def release_mapped_files(model: torch.nn.Module) -> None:
    """Copy what still lies in the mapped files: one embedding would keep all of them mapped.

    And the pages of the matrices that are quantized by now would count as ours: 212 MB of SmolLM2-135M's.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, Params4bit | Int8Params):
            tensor.data = tensor.data.clone()


@dataclass(frozen=True, slots=True)
class Attachment:
    """What `attach` put on a base, and what `detach` needs to restore it.

    `heads` are the base's own head modules by path, which PEFT wraps; `dropouts` are (module, attribute, rate) of the
    base's own dropouts that were set to 0.
    """

    adapted: Adapted
    heads: dict[str, torch.nn.Module]
    dropouts: list[tuple[torch.nn.Module, str, float]]


def attach(base: Base, recipe: Recipe) -> Attachment:
    """Put what the recipe trains on the base, in train mode; `detach` undoes it.

    A LoRA's weights are drawn from torch's global generator, so seed it first. Raises TrainingFailed, with the base
    untouched, if the recipe does not fit the base.
    """
    dropouts = own_dropouts(base.model) if recipe.method == "dpo" else []
    heads = {path: base.model.get_submodule(path) for path in base.head}
    adapted = _whole(base) if recipe.full_finetuning else _lora(base, recipe)
    # DPO compares tuned and reference likelihoods: dropout of the base would make them differ by chance.
    for module, name, _ in dropouts:
        setattr(module, name, 0.0)
    adapted.train()
    return Attachment(adapted, {} if recipe.full_finetuning else heads, dropouts)


def _whole(base: Base) -> FullWeights:
    if getattr(base.model, "hf_quantizer", None) is not None:
        raise TrainingFailed(
            "the base model's own files are quantized, and quantized weights cannot be trained",
            code="unsupported_base_model",
            param="trainer.full_finetuning",
            hint="leave it out and train a LoRA, or choose a base whose files are not quantized",
        )
    return FullWeights(base.model, stored=base.stored_dtype)


def _lora(base: Base, recipe: Recipe) -> PeftModel:
    """A fresh LoRA in fp32, its weights drawn from torch's global generator (seed it first)."""
    if not isinstance(recipe.target_modules, str):
        for target in recipe.target_modules:
            _check_target(base.model, target)
    try:
        with warnings.catch_warnings():
            # peft 0.21 still asks for a name that transformers 5 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(base.model, lora_config(base, recipe), autocast_adapter_dtype=True)
    except ValueError as error:
        raise _invalid_lora(f"the adapter does not fit the base: {error}") from error
    assert isinstance(model, PeftModel)
    if base.device.type == "cpu":
        # Measured there. On a GPU unpacking is fast, memory dear, and PEFT's own forward what fit.py describes.
        fused_lora.fuse(model)
    return model


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A published adapter, put on as any user would."""
    with warnings.catch_warnings():
        # peft 0.21 still asks for a name that transformers 5 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, folder)


def detach(attached: Attachment) -> None:
    """Leave the base exactly as it was before `attach`."""
    keep_activations(attached.adapted, kept=True)
    base = attached.adapted.unload()
    for path, module in attached.heads.items():
        base.set_submodule(path, module)
    for module, name, rate in attached.dropouts:
        setattr(module, name, rate)


def keep_activations(adapted: PeftModel, *, kept: bool) -> None:
    """From forward to backward, as a base does when it is loaded; or compute each layer's anew (checkpointing)."""
    model = adapted.get_base_model()
    if kept:
        model.activation_checkpointing_disable()
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})


def lora_config(base: Base, recipe: Recipe) -> LoraConfig:
    targets = _beside_head(base, recipe.target_modules) if base.head else recipe.target_modules
    return LoraConfig(
        task_type="SEQ_CLS" if base.head else "CAUSAL_LM",
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        fan_in_fan_out=_is_transposed(base.model),
        modules_to_save=list(base.head) or None,
    )


def trainable(adapted: Adapted) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name, in the model's order: the order of the optimizer."""
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def _beside_head(base: Base, targets: str | list[str]) -> list[str]:
    """Paths of the linear modules that are targets and not the head's: RoBERTa calls one of those `dense`, too.

    PEFT would name all of them by that last word, and leave the head out as it knows best; this leaves nothing to it.
    """
    names = None if isinstance(targets, str) else targets
    found = [
        path
        for path, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not classification_head.is_of(f"{path}.", base.head)
        and (names is None or any(f".{path}".endswith(f".{name}") for name in names))
    ]
    if not found:
        raise _invalid_lora(f"target_modules: {targets!r} names nothing but the head, which is trained in full")
    return found


def own_dropouts(model: PreTrainedModel) -> list[tuple[torch.nn.Module, str, float]]:
    """Where the base itself draws random numbers in training: (module, attribute, rate). Of no adapter that is on."""
    return [
        (module, name, rate)
        for module in model.modules()
        for name, rate in vars(module).items()
        if isinstance(rate, float) and rate > 0 and ("drop" in name or isinstance(module, torch.nn.Dropout))
    ]


def _is_transposed(model: PreTrainedModel) -> bool:
    """Does the base keep its weights as (in, out), as GPT-2 does? Quantized they are ordinary linears, and remember it.

    An adapter says so even if it was trained on those: whoever loads it may not quantize.
    """
    return any(isinstance(m, Conv1D) or getattr(m, "source_cls", None) is Conv1D for m in model.modules())


def _check_target(model: PreTrainedModel, target: str) -> None:
    """PEFT passes over a name that matches nothing, and takes the head and the embeddings, which the loss does not.

    The chunked loss runs the head frozen, and an adapter on tied or embedding weights would carry the whole matrix.
    """
    found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
    if not found:
        raise _invalid_lora(f"target_modules: {target!r} names no module of this base")
    if any(module in (model.get_input_embeddings(), model.get_output_embeddings()) for module in found):
        raise _invalid_lora(f"target_modules: {target!r} is the base's head or embedding, which stays frozen")
    if not all(isinstance(module, torch.nn.Linear | Conv1D) for module in found):
        raise _invalid_lora(f"target_modules: {target!r} is no linear module")


def _invalid_lora(message: str) -> TrainingFailed:
    return TrainingFailed(
        message,
        code="invalid_lora",
        param="lora.target_modules",
        hint='leave target_modules at "all-linear", or name linear modules of this base',
    )


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _stored_type(base_dir: str) -> torch.dtype:
    """By the config; one that says nothing is of fp32."""
    config = AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    return config.dtype or torch.float32


def _is_quantized(base_dir: str) -> bool:
    """Does the base come quantized (HQQ, compressed-tensors), and so perhaps need a library that no worker has?"""
    return "quantization_config" in json.loads((Path(base_dir) / "config.json").read_text(encoding="utf-8"))


def _quantization_config(
    quantization: Quantization, dtype: torch.dtype, *, skipped: list[str] | None
) -> BitsAndBytesConfig | None:
    """`skipped` are left as they are; None leaves what to skip to transformers: the output projection."""
    if quantization is Quantization.NF4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    if quantization is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return None
