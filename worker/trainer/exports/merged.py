"""An adapter laid on its base for good: a folder of safetensors that any reader of the base takes.

Owns: which weights it is laid on, in what type they stay, and the folder. The model is held once, merged where it lies,
one matrix at a time, and written shard by shard. Must not touch the base that it was given: it may be compared with.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from worker.trainer.exports.fingerprint import Unlike, differing, fingerprint
from worker.trainer.model.base import Base, load_adapter
from worker.trainer.protocol import Task

#: Under the 4 GiB that go up in one put, which the lease epoch fences.
SHARD = "4GB"
GENERATION = "generation_config.json"
#: Of the weights' bytes: beside them lie the matrix at hand, or the batch that is scored.
ROOM = 1.25


def original(task: Task, adapter: Path, stored: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The adapter on the base as it was published, in the type of its files."""
    return _merge(_plain(task, kept_type(stored), device), adapter)


def dequantized(task: Task, adapter: Path, quantized: Base, device: torch.device) -> PreTrainedModel:
    """The adapter on the values that it was trained against, which are those of `quantized`."""
    kept = kept_type(quantized.stored_dtype)
    # Nothing narrower than they are: the sum is rounded, once.
    plain = _plain(task, max(kept, quantized.compute_dtype, key=lambda dtype: dtype.itemsize), device)
    with torch.no_grad():
        for name, module in quantized.model.named_modules():
            if isinstance(module, Linear4bit | Linear8bitLt):
                into = plain.get_submodule(name)
                found = dequantize_module_weight(module)
                # Quantized, a Conv1D is an ordinary linear.
                into.weight.copy_(found.T if isinstance(into, Conv1D) else found)
    return _merge(plain, adapter).to(kept)


def place(device: torch.device, size: int) -> torch.device:
    """`device`, or the CPU if so many bytes of weights have no room there: in nf4 a base takes a quarter of them."""
    torch.cuda.empty_cache()  # what torch has kept of what is gone is free, too
    if device.type == "cuda" and size * ROOM > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def kept_type(stored: torch.dtype) -> torch.dtype:
    """Of an export, by the type of the base's files: fp16 and fp32 stay, and bf16 is for all else."""
    return stored if stored in (torch.float16, torch.float32) else torch.bfloat16


def write(folder: Path, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Weights in shards, config, tokenizer, and the base's own settings of generation."""
    # What writes it refuses settings that are of no effect, which published bases have: theirs is copied as it is.
    merged.generation_config = GenerationConfig()
    # A local path must not become the model's identity.
    merged.config._name_or_path = ""
    merged.save_pretrained(folder, max_shard_size=SHARD)
    (folder / GENERATION).unlink(missing_ok=True)
    if (theirs := Path(task.base_dir) / GENERATION).is_file():
        shutil.copyfile(theirs, folder / GENERATION)
    tokenizer.save_pretrained(folder)


def read(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """As any user would; and all of it, for transformers fills what is not there with random numbers. Raises Unlike."""
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
            raise Unlike(f"of its tensors {len(keys)} are {how}, {keys[0]} for one")
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
    """By stock PEFT, which knows rsLoRA, DoRA and Conv1D. Raises Unlike where no weight was changed by it."""
    before = fingerprint(plain, plain.dtype)
    found: PreTrainedModel = load_adapter(plain, adapter).merge_and_unload(safe_merge=True)
    if not differing(found, before):
        raise Unlike("merged, it is the base")
    return found
