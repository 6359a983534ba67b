"""Merge an adapter into its base: a folder of safetensors that any reader of the base can load.

Owns: which weights the adapter is merged into, the type they are stored in, and the folder. One copy of the model is in
memory; it is merged in place, one matrix at a time, and written shard by shard. Must not change the base that it is
given, which is still needed for comparison.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from worker.trainer.exports.fingerprint import Mismatch, differing, fingerprint
from worker.trainer.model.base import Base, load_adapter
from worker.trainer.protocol import Task

#: Less than the 4 GiB that fit into one S3 put, which is fenced by the lease epoch.
SHARD = "4GB"
GENERATION = "generation_config.json"
#: Free GPU memory needed, as a multiple of the weights' bytes. The excess is for the matrix that is being merged, or
#: the batch that is being scored.
ROOM = 1.25


def original(task: Task, adapter: Path, stored: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Merge the adapter into the base's original weights, in the type of the base's files."""
    return _merge(_plain(task, export_dtype(stored), device), adapter)


def dequantized(task: Task, adapter: Path, quantized: Base, device: torch.device) -> PreTrainedModel:
    """Merge the adapter into the dequantized weights of `quantized`, which it was trained against."""
    kept = export_dtype(quantized.stored_dtype)
    # In a type that is no narrower than these values, so that only the sum is rounded, and once.
    plain = _plain(task, max(kept, quantized.compute_dtype, key=lambda dtype: dtype.itemsize), device)
    with torch.no_grad():
        for name, module in quantized.model.named_modules():
            if isinstance(module, Linear4bit | Linear8bitLt):
                into = plain.get_submodule(name)
                found = dequantize_module_weight(module)
                # A quantized Conv1D is an ordinary linear layer.
                into.weight.copy_(found.T if isinstance(into, Conv1D) else found)
    return _merge(plain, adapter).to(kept)


def choose_device(device: torch.device, size: int) -> torch.device:
    """Return `device`, or the CPU if it is a GPU without room for `size` bytes of weights.

    Merged weights need four times as much memory as in nf4.
    """
    torch.cuda.empty_cache()  # so that the memory in torch's cache counts as free
    if device.type == "cuda" and size * ROOM > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def export_dtype(stored: torch.dtype) -> torch.dtype:
    """The type of an export's weights: fp16 and fp32 as in the base's files, bf16 for every other type."""
    return stored if stored in (torch.float16, torch.float32) else torch.bfloat16


def write(folder: Path, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Write sharded weights, config, tokenizer, and the base's own generation config."""
    # `save_pretrained` rejects generation settings that have no effect, which published bases have. So an empty config
    # is saved, and the base's file is copied unchanged.
    merged.generation_config = GenerationConfig()
    # A local path must not become the model's identity.
    merged.config._name_or_path = ""
    merged.save_pretrained(folder, max_shard_size=SHARD)
    (folder / GENERATION).unlink(missing_ok=True)
    if (theirs := Path(task.base_dir) / GENERATION).is_file():
        shutil.copyfile(theirs, folder / GENERATION)
    tokenizer.save_pretrained(folder)


def read(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the folder as any user would.

    Raises Mismatch for missing, mismatched or unexpected tensors: transformers fills missing ones with random numbers.
    """
    again: PreTrainedModel
    again, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    for how in ("missing", "mismatched", "unexpected"):
        if keys := sorted(map(str, loading[f"{how}_keys"])):
            raise Mismatch(f"{len(keys)} of its tensors are {how}, such as {keys[0]}")
    return again


def _plain(task: Task, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        task.base_dir,
        dtype=dtype,
        device_map={"": device},
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return plain


def _merge(plain: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Merge with PEFT itself, which supports rsLoRA, DoRA and Conv1D. Raises Mismatch if no weight changes."""
    before = fingerprint(plain, plain.dtype)
    found: PreTrainedModel = load_adapter(plain, adapter).merge_and_unload(safe_merge=True)
    if not differing(found, before):
        raise Mismatch("merging the adapter changes no weight of the base")
    return found
