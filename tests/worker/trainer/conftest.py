"""Tiny real models: random weights, a real byte-level tokenizer, loaded by the same code as any base."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before transformers is imported: no test may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shared.protocol import Task
from shared.schemas import Recipe
from worker.trainer.encoding import Encoder
from worker.trainer.prepare import prepare

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

Rows = list[dict[str, Any]]
WriteRows = Callable[[Rows], str]
MakeTask = Callable[..., Task]


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
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conv1D layers, learned positions, biases: what is unlike Llama."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=256, eos_token_id=2, bos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder(llama: str) -> Encoder:
    return Encoder(llama)


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(rows: Rows) -> str:
        path = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make_task(llama: str) -> MakeTask:
    def make(training_file: str, **fields: Any) -> Task:
        values: dict[str, Any] = {
            "base_dir": llama,
            "base_name": "acme/tiny",
            "base_revision": "0" * 40,
            "training_file": training_file,
            "validation_file": None,
            "hyperparameters": {},
            "lora": {},
            "quantization": "none",
            "trainer": {},
            "seed": 7,
            "torch_threads": 1,
            "max_row_bytes": 1 << 20,
        }
        return Task.model_validate(values | fields)

    return make


def quotes(count: int) -> Rows:
    """Rows of different lengths that share a pattern."""
    return [{"text": f'Quote by N{i % 5}: "{"hat " * (1 + i % 7)}{i}"'} for i in range(count)]


def recipe_of(task: Task, **changes: Any) -> Recipe:
    return prepare(task).recipe.model_copy(update=changes)
