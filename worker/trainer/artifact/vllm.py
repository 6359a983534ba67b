"""Whether vLLM can serve an adapter or a model, by limits that were copied from its source.

Owns: the limits of `vllm/config/lora.py` and `vllm/lora/peft_helper.py`, and some of the architectures of
`vllm/model_executor/models/registry.py`. Must not import torch.

The limits are those of vLLM 0.27. They were read, not tested: vLLM is not installed. They can become outdated. To check
them against a newer version, compare in its source:

- RANKS with the type of `LoRAConfig.max_lora_rank` in `vllm/config/lora.py`;
- the objections in `lora_support` with `PEFTHelper` in `vllm/lora/peft_helper.py`;
- ARCHITECTURES with `vllm/model_executor/models/registry.py`, and WITHOUT_LORA with which of those classes have
  `SupportsLoRA`.
"""

from __future__ import annotations

from typing import Any

from shared.schemas.results import Servable

#: Allowed values of `--max-lora-rank`.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Architectures that vLLM serves without LoRA support.
WITHOUT_LORA = frozenset({"GPT2LMHeadModel"})
#: Some of the architectures that vLLM implements. It runs others through transformers if it can.
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
    """The smallest value of `--max-lora-rank` for an adapter of rank `r`; None if `r` is over the limit."""
    return next((allowed for allowed in RANKS if allowed >= r), None)


def lora_support(config: dict[str, Any], architecture: str) -> Servable:
    """Whether vLLM can serve an adapter with this `adapter_config.json` on a base of this class, and why not."""
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
    """Whether vLLM can serve a whole model of this class, without a LoRA, and why not."""
    reasons = [] if architecture in ARCHITECTURES else [f"vLLM is not known to implement {architecture}"]
    return Servable(servable=not reasons, max_lora_rank=None, reasons=reasons)
