"""How llama.cpp names and lays out the architectures that we export.

Owns: for each architecture, tensor names, tensor layouts, hyperparameters under GGUF's keys, and what llama.cpp assumes
that a config may contradict. Must not read or write files, nor import torch: planning uses it before training, on a
worker that may have no GPU.

This knowledge is copied and can become outdated. It was read from llama.cpp's `conversion/*.py` and `src/models/*.cpp`
of 2026-10, and compared once, by hand, with llama.cpp itself (xllamacpp 2026.10.11549). Names and keys were checked
against gguf 0.19.0. To check again:

1. `pytest tests/worker/trainer/llama_cpp` fails if the installed `gguf` lacks an architecture, tensor name or key that
   we write. It does not test llama.cpp's arithmetic.
2. For each entry of FORMS, read llama.cpp's converter and graph for that architecture: activation, rotary layout, norm
   offset, transposed weights, local layers, attention scale.
3. Run llama.cpp on an export of each architecture, as docs/explain/exports.md describes. It must give the same tokens,
   and log-probabilities within 0.1 of transformers in fp32.
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
#: llama.cpp's fixed rotary base for Gemma 3's local layers.
LOCAL_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Form:
    """How llama.cpp represents one architecture.

    `name` is llama.cpp's name for it, `activation` the only activation that it computes.
    `interleaves_rotary`: in q and k, the two halves of each head's rotary dimensions are interleaved.
    `norm_offset` is added to norm weights: transformers adds it when it runs, llama.cpp multiplies by what is stored.
    `transposed` are the ends of names whose matrices are stored transposed (Conv1D).
    `local_layers`: of each `local_layers + 1` consecutive layers, all but the last have a sliding window. 0: none has.
    """

    name: str
    activation: str
    interleaves_rotary: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    local_layers: int = 0


FORMS = {
    "llama": Form("llama", "silu", interleaves_rotary=True),
    "mistral": Form("llama", "silu", interleaves_rotary=True),
    "qwen2": Form("qwen2", "silu"),
    "qwen3": Form("qwen3", "silu"),
    "phi3": Form("phi3", "silu"),
    "gemma2": Form("gemma2", "gelu_pytorch_tanh", norm_offset=1.0, local_layers=1),
    "gemma3_text": Form("gemma3", "gelu_pytorch_tanh", norm_offset=1.0, local_layers=5),
    "gpt2": Form("gpt2", "gelu_new", transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight")),
}


def refusal(config: PretrainedConfig) -> str | None:
    """The first reason why llama.cpp would not compute what this model does; None if none is known.

    It is a noun phrase that completes "this base has …".
    """
    form = FORMS.get(config.model_type)
    if form is None:
        return f"the architecture {config.model_type!r}; supported: {', '.join(sorted(FORMS))}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = activation or getattr(config, "activation_function", None)
    rope = _rope(config)
    scaling = rope.get("rope_type", "default")
    rotary = rope.get("partial_rotary_factor") or 1.0
    scalar = getattr(config, "query_pre_attn_scalar", None)
    window = getattr(config, "sliding_window", None)
    theirs = f"llama.cpp's {form.name}"
    layers = f"{form.local_layers} in {form.local_layers + 1}, with a rotary base of {LOCAL_THETA:g}"
    objections = [
        (activation != form.activation, f"the activation {activation!r}; {theirs} has {form.activation!r}"),
        (
            scaling not in ("default", "linear", "llama3"),
            f"rotary positions scaled by {scaling!r}; supported: default, linear, llama3",
        ),
        (
            rotary != 1.0 and form.name != "phi3",
            f"rotary positions on {rotary:g} of each head's dimensions; {theirs} has them on all",
        ),
        (
            scalar is not None and scalar != config.head_dim,
            f"attention scaled by {scalar} (query_pre_attn_scalar); {theirs} scales by the head width",
        ),
        (
            form.norm_offset and not config.tie_word_embeddings,
            f"an untied output head (tie_word_embeddings is false); {theirs} needs it tied",
        ),
        (
            form.local_layers and not _has_usual_layers(config, form.local_layers),
            f"an unusual pattern of local layers; {theirs} has {layers}",
        ),
        (getattr(config, "use_bidirectional_attention", None), "bidirectional attention"),
        (
            getattr(config, "scale_attn_by_inverse_layer_idx", False),
            "attention scaled by the layer index (scale_attn_by_inverse_layer_idx is true)",
        ),
        (not getattr(config, "scale_attn_weights", True), "unscaled attention (scale_attn_weights is false)"),
        (_has_window(config, form), f"a sliding window of {window} tokens, which llama.cpp does not apply"),
    ]
    return next((reason for holds, reason in objections if holds), None)


def names(config: PretrainedConfig) -> Callable[[str], str | None]:
    """Return a function from transformers' module names to llama.cpp's, which gives None for an unknown name."""
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == FORMS[config.model_type].name)
    known: TensorNameMap = get_tensor_name_map(MODEL_ARCH(arch), config.num_hidden_layers)

    def name_of(module: str) -> str | None:
        found: str | None = known.get_name(module)
        return found

    return name_of


def to_llama_cpp_layout(name: str, tensor: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Convert a parameter of transformers to llama.cpp's layout. `name` is transformers' name for it.

    Conv1D stores (in, out) and is transposed to (out, in). A LoRA on a Conv1D is stored that way already. Of a LoRA,
    only B is converted, by `interleave_rotary`.
    """
    form = FORMS[config.model_type]
    if form.transposed and tensor.ndim == 2 and name.endswith(form.transposed):
        return tensor.T
    if form.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + form.norm_offset
    return interleave_rotary(name, tensor, config)


def interleave_rotary(name: str, tensor: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Interleave the halves of each head's rows (or bias) of q and k: 0, n/2, 1, n/2 + 1, … for a head of n rows.

    Other tensors, and those of other architectures, are returned unchanged.
    """
    module = name.rsplit(".", 2)[-2]
    if not FORMS[config.model_type].interleaves_rotary or module not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_hyperparameters(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Write the hyperparameters that llama.cpp needs to run the tensors."""
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
        writer.add_sliding_window(0)  # without it, older versions of llama.cpp assume a window
    if form.local_layers:
        writer.add_sliding_window(config.sliding_window)
        if cap := getattr(config, "attn_logit_softcapping", None):
            writer.add_attn_logit_softcapping(cap)
        if cap := getattr(config, "final_logit_softcapping", None):
            writer.add_final_logit_softcapping(cap)


def rope_factors(config: PretrainedConfig) -> list[float] | None:
    """Divisors of the rotary frequencies, one per pair of dimensions; None unless they are scaled as in Llama 3.1.

    llama.cpp stores them as a tensor. Wavelengths within the original context are unchanged, those far beyond it are
    stretched by `factor`, and those between are interpolated, as in transformers' `_compute_llama3_parameters`.
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
    """Base of the rotary frequencies, of the global layers if there are two kinds; None without rotary positions."""
    theta: float | None = _rope(config).get("rope_theta")
    return theta


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    of_global_layers: dict[str, Any] = rope.get("full_attention", rope)
    return of_global_layers


def _has_window(config: PretrainedConfig, form: Form) -> bool:
    """Whether the model has a sliding window, shorter than its context, that llama.cpp ignores.

    Of these architectures, llama.cpp applies windows in Gemma only. Mistral's window is accepted: llama.cpp has always
    run those models without it.
    """
    window = getattr(config, "sliding_window", None)
    if form.local_layers or config.model_type == "mistral" or window is None:
        return False
    kinds = getattr(config, "layer_types", None)
    used: bool = kinds is None or "sliding_attention" in kinds
    return used and window < config.max_position_embeddings


def _has_usual_layers(config: PretrainedConfig, local: int) -> bool:
    """Whether local and global layers alternate as llama.cpp assumes, with its rotary base in the local ones."""
    kinds = ("full_attention", "sliding_attention")
    usual = [kinds[(i + 1) % (local + 1) != 0] for i in range(config.num_hidden_layers)]
    rope = getattr(config, "rope_parameters", None) or {}
    theta: float = rope.get("sliding_attention", {}).get("rope_theta", LOCAL_THETA)
    return list(config.layer_types) == usual and theta == LOCAL_THETA
