"""How llama.cpp names and lays out the architectures that it shares with us.

Owns: per architecture, the names of its tensors, how they are turned, its hyperparameters in GGUF's keys, and what
llama.cpp takes for granted that a config may say otherwise. Read from its conversion/*.py and src/models/*.cpp
(2026-10). Must not read or write a file, nor import torch: it is asked before training, on a worker without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TensorNameMap, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, RopeScalingType

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

ROPE_FACTORS = "rope_freqs.weight"
#: Of Gemma 3's layers with a window.
LOCAL_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Form:
    """One architecture in llama.cpp.

    `pairs_rotary`: the two halves of a head's rotary dimensions are interleaved in q and k. `norm_offset` is added to
    norms, which llama.cpp multiplies with as they are. `local_layers` of so many that follow one another see a window.
    """

    name: str
    activation: str
    pairs_rotary: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    local_layers: int = 0


FORMS = {
    "llama": Form("llama", "silu", pairs_rotary=True),
    "mistral": Form("llama", "silu", pairs_rotary=True),
    "qwen2": Form("qwen2", "silu"),
    "qwen3": Form("qwen3", "silu"),
    "phi3": Form("phi3", "silu"),
    "gemma2": Form("gemma2", "gelu_pytorch_tanh", norm_offset=1.0, local_layers=1),
    "gemma3_text": Form("gemma3", "gelu_pytorch_tanh", norm_offset=1.0, local_layers=5),
    "gpt2": Form("gpt2", "gelu_new", transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight")),
}


def refusal(config: PretrainedConfig) -> str | None:
    """Why llama.cpp would compute something else than this model does; None if nothing is known."""
    form = FORMS.get(config.model_type)
    if form is None:
        return f"the architecture {config.model_type!r}; known are {', '.join(sorted(FORMS))}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = activation or getattr(config, "activation_function", None)
    rope = _rope(config)
    scaling = rope.get("rope_type", "default")
    rotary = rope.get("partial_rotary_factor") or 1.0
    scalar = getattr(config, "query_pre_attn_scalar", None)
    objections = {
        f"the activation {activation!r}; {form.name} has {form.activation!r}": activation != form.activation,
        f"rotary positions scaled by {scaling!r}; default, linear and llama3 are known": scaling
        not in ("default", "linear", "llama3"),
        f"rotary positions on {rotary:g} of a head's dimensions": rotary != 1.0 and form.name != "phi3",
        f"attention scaled by {scalar}; {form.name} scales by the head's width": scalar is not None
        and scalar != config.head_dim,
        "a head of its own (tie_word_embeddings is false)": form.norm_offset and not config.tie_word_embeddings,
        f"another pattern of local layers than {form.local_layers} in {form.local_layers + 1}": form.local_layers
        and not _has_usual_layers(config, form.local_layers),
        "bidirectional attention": getattr(config, "use_bidirectional_attention", None),
        "attention scaled by the layer": getattr(config, "scale_attn_by_inverse_layer_idx", False),
        "attention that is not scaled": not getattr(config, "scale_attn_weights", True),
        f"a sliding window of {getattr(config, 'sliding_window', None)} tokens": _has_window(config, form),
    }
    return next((objection for objection, holds in objections.items() if holds), None)


def names(config: PretrainedConfig) -> Callable[[str], str | None]:
    """From a module's name, as transformers has it, to llama.cpp's; None for what it does not know."""
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == FORMS[config.model_type].name)
    known: TensorNameMap = get_tensor_name_map(MODEL_ARCH(arch), config.num_hidden_layers)

    def name_of(module: str) -> str | None:
        found: str | None = known.get_name(module)
        return found

    return name_of


def laid_out(name: str, tensor: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """A parameter as llama.cpp wants it; of a LoRA, B goes through this under its matrix's name, and A does not.

    Conv1D keeps (in, out) and is turned to (out, in), which is how a LoRA on it is stored already.
    """
    form = FORMS[config.model_type]
    if form.transposed and tensor.ndim == 2 and name.endswith(form.transposed):
        return tensor.T
    if form.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + form.norm_offset
    return with_paired_rotary(name, tensor, config)


def with_paired_rotary(name: str, tensor: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Rows (or a bias) of q and k: dimension i of a head's first half comes to lie beside that of its second."""
    module = name.rsplit(".", 2)[-2]
    if not FORMS[config.model_type].pairs_rotary or module not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_hyperparameters(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """All that llama.cpp needs to know to run the tensors."""
    form, rope = FORMS[config.model_type], _rope(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if form.name == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(int(width * (rope.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if form.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(
            getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        )
        writer.add_sliding_window(0)  # without it, an older llama.cpp guesses one
    if form.local_layers:
        writer.add_sliding_window(config.sliding_window)
        if cap := getattr(config, "attn_logit_softcapping", None):
            writer.add_attn_logit_softcapping(cap)
        if cap := getattr(config, "final_logit_softcapping", None):
            writer.add_final_logit_softcapping(cap)


def rope_factors(config: PretrainedConfig) -> list[float] | None:
    """What each rotary frequency is divided by (Llama 3.1's scaling), which llama.cpp keeps as a tensor.

    Wavelengths within the original context stay, those far beyond it are stretched by `factor`, between is blended.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, width, 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (i / width))
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1.0 / (kept + (1.0 - kept) / rope["factor"]))
    return factors


def rope_theta(config: PretrainedConfig) -> float | None:
    """The base of the rotary frequencies, of global layers where there are two; None without rotary positions."""
    theta: float | None = _rope(config).get("rope_theta")
    return theta


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    of_global_layers: dict[str, Any] = rope.get("full_attention", rope)
    return of_global_layers


def _has_window(config: PretrainedConfig, form: Form) -> bool:
    """One that a context can be longer than, and that llama.cpp does not heed: it has windows in Gemma alone.

    Mistral's is let pass: llama.cpp has run the models that have one without it since they came out.
    """
    window = getattr(config, "sliding_window", None)
    if form.local_layers or config.model_type == "mistral" or window is None:
        return False
    kinds = getattr(config, "layer_types", None)
    heeded: bool = kinds is None or "sliding_attention" in kinds
    return heeded and window < config.max_position_embeddings


def _has_usual_layers(config: PretrainedConfig, local: int) -> bool:
    kinds = ("full_attention", "sliding_attention")
    usual = [kinds[(i + 1) % (local + 1) != 0] for i in range(config.num_hidden_layers)]
    rope = getattr(config, "rope_parameters", None) or {}
    theta: float = rope.get("sliding_attention", {}).get("rope_theta", LOCAL_THETA)
    return list(config.layer_types) == usual and theta == LOCAL_THETA
