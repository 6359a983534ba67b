"""Tiny real models with random weights and a real byte-level tokenizer, loaded by the same code as any base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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


def tiny_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with 256 bytes, a few merges and ChatML. Its pad token is its EOS token, as in many real ones."""
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


def tiny_llama(folder: Path, *, seed: int = 0) -> None:
    """Write a Llama with two layers of random weights."""
    torch.manual_seed(seed)
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
    # A new model has zeros in the pad token's embedding. Pad is EOS here, and with zeros no model could learn EOS.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


#: The sizes of a tiny base, under the names that most architectures use, and under GPT-2's.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ENCODER_SIZES = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GPT2_SIZES: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}


def tiny_base(folder: Path, model_type: str, **config: Any) -> None:
    """Write a base of any architecture that transformers knows, with two layers of random weights."""
    torch.manual_seed(0)
    sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
    special = {"vocab_size": 320, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 2}
    configuration = AutoConfig.for_model(model_type, **sizes, **special, initializer_range=0.2, **config)
    model = AutoModelForCausalLM.from_config(configuration)
    # A new model has zeros in the pad token's embedding. Pad is EOS here, and with zeros no model could learn EOS.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def tiny_gpt2(folder: Path) -> None:
    """Write a GPT-2: unlike Llama, it has Conv1D layers, learned positions and biases."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=256, eos_token_id=2, bos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def encoder_tokenizer(*, typed: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that makes `[CLS] a [SEP] b [SEP]`. If `typed`, it also returns token types (1: second text)."""
    special = {"cls_token": "<|im_start|>", "sep_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    names = ["input_ids", *["token_type_ids"] * typed, "attention_mask"]
    tokenizer = tiny_tokenizer(eos_token=None, model_input_names=names, **special)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    return tokenizer


def tiny_encoder(folder: Path, model_type: str, **config: Any) -> None:
    """Write an encoder with two layers of random weights, as a masked language model like after pretraining."""
    torch.manual_seed(0)
    special = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    configuration = AutoConfig.for_model(model_type, **ENCODER_SIZES, **special, initializer_range=0.2, **config)
    AutoModelForMaskedLM.from_config(configuration).save_pretrained(folder)
    encoder_tokenizer(typed=config.get("type_vocab_size") != 1).save_pretrained(folder)
