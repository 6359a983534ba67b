"""Tiny real models: random weights, a real byte-level tokenizer, loaded by the same code as any base."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

# Before transformers is imported: no test may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.local.folder import Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
CORPUS = [
    "the hat on the head of the milliner",
    'Quote by NAME: "a felt hat is a hat that is felt"',
    "user assistant system",
]

# A model this small is slower on two threads, and much slower where others work too.
torch.set_num_threads(1)


def tiny_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """256 bytes, a few merges, ChatML; pad = eos, which is the trap."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | options
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = CHATML
    return wrapped


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    # A fresh model has zeros in the padding's row; padding is EOS here, and no model could learn to say that.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(stack: Record, llama: str) -> str:
    """The name of a tiny base in the stack's catalog, so that whole jobs take seconds."""
    command = [sys.executable, "-m", "deploy.local", "add-model", "tiny", llama, "--data", stack.data]
    subprocess.run([*command, "--public-id", "acme/tiny", "--revision", "1"], check=True, capture_output=True)
    return "tiny"
