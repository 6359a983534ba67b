"""Load the frozen base model, attach trainable weights to it, and detach them.

Owns: loading at a quantization, attaching a LoRA or full weights (`full_weights.py`), and working around a bug of
bitsandbytes on CPUs (`disable_avx512_repacking`). Must not run remote code, use the network, or change a frozen weight:
the next job may use the same base.
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
    """A loaded base model.

    `compute_dtype` is the type of its matrix products; losses and adapters are fp32. `stored_dtype` is the type in its
    files. For a classifier, `head` holds the paths of its head modules, and `uninitialized` the names of the head
    parameters for which the files have no usable values.
    """

    model: PreTrainedModel
    device: torch.device
    compute_dtype: torch.dtype
    stored_dtype: torch.dtype = torch.float32
    head: tuple[str, ...] = ()
    uninitialized: tuple[str, ...] = ()

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast to the compute type. Adapters are fp32 even on a bf16 base: in bf16 small updates would be lost."""
        # No cache of cast weights: all threads share it, and the first one to leave autocast clears it.
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
    """Load a base from safetensors and quantize it on the fly. It computes in bf16 where the machine does so fast.

    With `labels` the model is a classifier; call `classification_head.initialize` before using it. Raises
    TrainingFailed if the folder holds no usable model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype or (torch.bfloat16 if _fast_bfloat16(device) else torch.float32)
    try:
        model, loading = (AutoModelForSequenceClassification if labels else AutoModelForCausalLM).from_pretrained(
            base_dir,
            # The files may hold a head with another number of labels; it is initialized anew. Any other tensor with a
            # wrong shape is an error, raised below.
            **({"num_labels": len(labels), "ignore_mismatched_sizes": True} if labels else {}),
            quantization_config=_quantization_config(
                quantization, dtype, skip_modules=classification_head.unquantized(base_dir) if labels else None
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
    missing = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    head = classification_head.head(model, missing) if labels else ()
    if labels is not None and classification_head.labels_differ(model.config, labels):
        outputs = {name for name, parameter in model.named_parameters() if len(parameter) == len(labels)}
        missing |= {name for name in outputs if classification_head.in_head(name, head)}
    if absent := sorted(name for name in missing if not classification_head.in_head(name, head)):
        # transformers only logs a warning, and fills missing tensors with random numbers.
        raise TrainingFailed(
            f"the base model's files lack {len(absent)} of its weights, such as {absent[0]}",
            code="unsupported_base_model",
            param="model",
            hint="import the whole model again" + ("" if labels else ", or one that generates text"),
        )
    for path in head:
        model.get_submodule(path).float()
    disable_avx512_repacking(model)
    short_attention.use(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    if device.type == "cpu" and quantization is not Quantization.NONE:
        release_mapped_files(model)
    free_memory.free()  # the heap keeps half a gigabyte of SmolLM2-135M's unquantized matrices otherwise
    return Base(model, device, dtype, _stored_type(base_dir), head, tuple(sorted(missing)))


def disable_avx512_repacking(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It repacks at the first no-grad forward in eval mode and never undoes it. After one evaluation, training then loses
    the gradients that flow through the base: LoRA gradients are 87 % wrong, while the loss looks the same.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def release_mapped_files(model: torch.nn.Module) -> None:
    """Copy every tensor that is still memory-mapped from the files, so that the files are unmapped.

    A single mapped embedding would keep whole files mapped, and their pages count as memory of this process: 212 MB of
    SmolLM2-135M's matrices, which are quantized by now.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, Params4bit | Int8Params):
            tensor.data = tensor.data.clone()


@dataclass(frozen=True, slots=True)
class Attachment:
    """The weights that `attach` added to a base, and what `detach` needs to restore it.

    `heads` maps path to the base's own head module, which PEFT wraps. `dropouts` are (module, attribute, rate) of the
    base's own dropouts that `attach` set to 0.
    """

    adapted: Adapted
    heads: dict[str, torch.nn.Module]
    dropouts: list[tuple[torch.nn.Module, str, float]]


def attach(base: Base, recipe: Recipe) -> Attachment:
    """Attach the recipe's trainable weights to the base, in train mode; `detach` undoes it.

    A LoRA's weights come from torch's global generator: seed it first. Raises TrainingFailed if the recipe does not fit
    the base, which is then unchanged.
    """
    dropouts = own_dropouts(base.model) if recipe.method == "dpo" else []
    heads = {path: base.model.get_submodule(path) for path in base.head}
    adapted = _full_weights(base) if recipe.full_finetuning else _lora(base, recipe)
    # DPO compares likelihoods of tuned and reference model; the base's dropout would make them differ at random.
    for module, name, _ in dropouts:
        setattr(module, name, 0.0)
    adapted.train()
    return Attachment(adapted, {} if recipe.full_finetuning else heads, dropouts)


def _full_weights(base: Base) -> FullWeights:
    if getattr(base.model, "hf_quantizer", None) is not None:
        raise TrainingFailed(
            "the base model's own files are quantized, and quantized weights cannot be trained",
            code="unsupported_base_model",
            param="trainer.full_finetuning",
            hint="remove this setting and train a LoRA, or choose a base whose files are not quantized",
        )
    return FullWeights(base.model, stored=base.stored_dtype)


def _lora(base: Base, recipe: Recipe) -> PeftModel:
    """A new LoRA in fp32. A is drawn from torch's global generator; B is zero, so at first the LoRA changes nothing."""
    if not isinstance(recipe.target_modules, str):
        for target in recipe.target_modules:
            _check_target(base.model, target)
    try:
        with warnings.catch_warnings():
            # peft 0.21 uses an attribute that transformers 5 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(base.model, lora_config(base, recipe), autocast_adapter_dtype=True)
    except ValueError as error:
        raise _invalid_lora(f"the adapter does not fit the base: {error}") from error
    assert isinstance(model, PeftModel)
    if base.device.type == "cpu":
        # Only measured on CPUs. On a GPU dequantizing is fast and memory is scarce, and the memory model
        # (shared/estimation/memory_model.py) describes PEFT's own forward.
        fused_lora.fuse(model)
    return model


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load a published adapter with stock PEFT, as a user would."""
    with warnings.catch_warnings():
        # peft 0.21 uses an attribute that transformers 5 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, folder)


def detach(attached: Attachment) -> None:
    """Restore the base to exactly what it was before `attach`."""
    keep_activations(attached.adapted, kept=True)
    base = attached.adapted.unload()
    for path, module in attached.heads.items():
        base.set_submodule(path, module)
    for module, name, rate in attached.dropouts:
        setattr(module, name, rate)


def keep_activations(adapted: PeftModel, *, kept: bool) -> None:
    """Keep activations for the backward pass (the default), or recompute them there (gradient checkpointing)."""
    model = adapted.get_base_model()
    if kept:
        model.activation_checkpointing_disable()
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})


def lora_config(base: Base, recipe: Recipe) -> LoraConfig:
    """PEFT's configuration for the recipe's LoRA on this base."""
    targets = _targets_without_head(base, recipe.target_modules) if base.head else recipe.target_modules
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
    """The trainable parameters by name, in the model's order."""
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def _targets_without_head(base: Base, targets: str | list[str]) -> list[str]:
    """Full paths of the linear modules that match `targets` and are not part of the classification head.

    The last part of a name is not enough: RoBERTa has a `dense` in its backbone and one in its head.
    """
    names = None if isinstance(targets, str) else targets
    found = [
        path
        for path, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not classification_head.in_head(f"{path}.", base.head)
        and (names is None or any(f".{path}".endswith(f".{name}") for name in names))
    ]
    if not found:
        raise _invalid_lora(f"target_modules: {targets!r} matches only the head, which is trained in full anyway")
    return found


def own_dropouts(model: PreTrainedModel) -> list[tuple[torch.nn.Module, str, float]]:
    """The base's dropouts, as (module, attribute, rate). Call it before an adapter with dropout is attached."""
    return [
        (module, name, rate)
        for module in model.modules()
        for name, rate in vars(module).items()
        if isinstance(rate, float) and rate > 0 and ("drop" in name or isinstance(module, torch.nn.Dropout))
    ]


def _is_transposed(model: PreTrainedModel) -> bool:
    """Whether the base stores weights as (in, out), as GPT-2 does (`fan_in_fan_out` in PEFT).

    Quantized, its modules become ordinary linear modules that keep the original class in `source_cls`. The adapter's
    config must be true for the unquantized base too, because whoever loads the adapter may not quantize.
    """
    return any(isinstance(m, Conv1D) or getattr(m, "source_cls", None) is Conv1D for m in model.modules())


def _check_target(model: PreTrainedModel, target: str) -> None:
    """Refuse a target that matches no module, or the head or an embedding, or a module that is not linear.

    PEFT ignores a name without a match, and accepts head and embeddings. But the chunked loss needs a frozen head, and
    an adapter on embeddings or tied weights would have to contain the whole matrix.
    """
    found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
    if not found:
        raise _invalid_lora(f"target_modules: {target!r} matches no module of this base")
    if any(module in (model.get_input_embeddings(), model.get_output_embeddings()) for module in found):
        raise _invalid_lora(f"target_modules: {target!r} is the base's head or embedding, which stays frozen")
    if not all(isinstance(module, torch.nn.Linear | Conv1D) for module in found):
        raise _invalid_lora(f"target_modules: {target!r} is not a linear module")


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
    """The type in the base's files, by its config; fp32 if the config names none."""
    config = AutoConfig.from_pretrained(base_dir, local_files_only=True, trust_remote_code=False)
    return config.dtype or torch.float32


def _is_quantized(base_dir: str) -> bool:
    """Whether the files are already quantized (HQQ, compressed-tensors): that may need a library no worker has."""
    return "quantization_config" in json.loads((Path(base_dir) / "config.json").read_text(encoding="utf-8"))


def _quantization_config(
    quantization: Quantization, dtype: torch.dtype, *, skip_modules: list[str] | None
) -> BitsAndBytesConfig | None:
    """`skip_modules` are not quantized; with None transformers skips the output projection."""
    if quantization is Quantization.NF4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip_modules,
        )
    if quantization is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
    return None
