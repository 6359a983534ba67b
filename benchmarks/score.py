"""Score adapters with stock PEFT on the NF4 base, one row at a time.

Owns: the held-out loss that the table compares. Must not use code of ours or of the peer.
`python -m benchmarks.score BASE ROWS ADAPTER…` prints a JSON list: mean losses in nats per token (end-of-text token
included), in the order of the adapters. An empty name means the base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main(base: str, rows: str, adapters: list[str]) -> None:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line)["text"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    losses = []
    for adapter in adapters:
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.bfloat16)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        losses.append(_loss(model.eval(), documents))
    print(json.dumps(losses))


def _loss(model: torch.nn.Module, documents: list[list[int]]) -> float:
    total, tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([document])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += len(document) - 1
    return total / tokens


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
