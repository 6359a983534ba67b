"""What others serve: whether vLLM would take an adapter or a model, read from its source and not tried.

Owns: the limits of vllm/config/lora.py and vllm/lora/peft_helper.py as of version 0.27, and some of the architectures
of vllm/model_executor/models/registry.py. Must not import torch.
"""

from __future__ import annotations

from typing import Any

from shared.schemas.results import Servable

#: What `--max-lora-rank` may be.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
WITHOUT_LORA = frozenset({"GPT2LMHeadModel"})
#: That it has an implementation of. There are more; and others it runs through transformers, where it can.
ARCHITECTURES = frozenset(
    {
        "BloomForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel",
        "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "GlmForCausalLM",
        "GraniteForCausalLM", "Lfm2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
        "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "Phi3ForCausalLM",
        "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
    }
)  # fmt: skip


def max_lora_rank(r: int) -> int | None:
    """The least that `--max-lora-rank` must say for an adapter of rank `r`; None if it cannot say so much."""
    return next((allowed for allowed in RANKS if allowed >= r), None)


def lora_support(config: dict[str, Any], architecture: str) -> Servable:
    """Its verdict on an `adapter_config.json`, for a base of this class."""
    rank = max_lora_rank(config["r"])
    objections = {
        f"its rank, {config['r']}, is over {RANKS[-1]}": rank is None,
        "it is a DoRA": config.get("use_dora"),
        "it holds whole modules (modules_to_save)": config.get("modules_to_save"),
        "it trains biases": config.get("bias", "none") != "none",
        f"vLLM runs no LoRA on {architecture}": architecture in WITHOUT_LORA,
    }
    reasons = [reason for reason, holds in objections.items() if holds]
    return Servable(servable=not reasons, max_lora_rank=rank, reasons=reasons)


def model_support(architecture: str) -> Servable:
    """Its verdict on a whole model of this class, which it serves without a LoRA."""
    reasons = [] if architecture in ARCHITECTURES else [f"vLLM is not known to implement {architecture}"]
    return Servable(servable=not reasons, max_lora_rank=None, reasons=reasons)
