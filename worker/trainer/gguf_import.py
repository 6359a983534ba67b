"""Convert a GGUF file to bf16 safetensors with a tokenizer: `python -m worker.trainer.gguf_import GGUF OUT_DIR`.

Owns: the one-time dequantization of an imported base model. It is a process of its own, so that the importer needs no
torch. Must not use the network. Must not leave a partial folder: OUT_DIR appears complete or not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from shared.disk import atomic_folder
from shared.linux import kill_when_parent_dies

#: llama.cpp's keys for tokens that end generation. Chat models often end a turn with another token than a text.
STOP_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def convert(gguf: Path, out: Path) -> None:
    """Dequantize the file `gguf` into the folder `out`. Raises FileExistsError if `out` is not empty."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a new or empty folder")
    with atomic_folder(out) as partial:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=stop_tokens(gguf) or tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        # A GGUF's name is free text: a local path or an old name must not become the model's identity.
        model.config._name_or_path = ""
        if model.config.max_position_embeddings:
            tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if out.exists():
            out.rmdir()  # raises OSError if it is no longer empty
        # The temporary folder and safetensors' files are readable by their owner only; a base model is not secret.
        partial.chmod(0o755)
        for path in partial.iterdir():
            path.chmod(0o644)


def stop_tokens(gguf: Path) -> list[int]:
    """Ids of the tokens that end generation, as the file says, in ascending order."""
    fields = GGUFReader(gguf).fields
    found = [int(fields[key].contents()) for key in STOP_KEYS if key in fields]
    return sorted(set(found))


def main(argv: list[str]) -> int:
    """Parse arguments and convert one file."""
    parser = argparse.ArgumentParser(prog="worker.trainer.gguf_import", description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process ends")
    args = parser.parse_args(argv)
    if args.parent is not None:
        kill_when_parent_dies(args.parent)
    os.environ["HF_HUB_OFFLINE"] = "1"
    convert(args.gguf.resolve(strict=True), args.out.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
