"""A GGUF file, written by llama.cpp's own package, becomes a base that the trainer can load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.schemas.requests import Quantization
from worker.trainer.data.encoding import Encoder
from worker.trainer.model.base import load_base

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def gguf(llama: str, tmp_path: Path) -> Path:
    """The tiny Llama as GGUF. Its chat turns end with another token than its texts."""
    tensors = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()
    tokenizer = json.loads((Path(llama) / "tokenizer.json").read_text())["model"]
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(320)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_types([3] * 4 + [1] * (len(tokenizer["vocab"]) - 4))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_chat_template((Path(llama) / "chat_template.jinja").read_text())
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(2):
        names |= {
            f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}"
            for ours, theirs in {
                "self_attn.q_proj": "attn_q",
                "self_attn.k_proj": "attn_k",
                "self_attn.v_proj": "attn_v",
                "self_attn.o_proj": "attn_output",
                "mlp.gate_proj": "ffn_gate",
                "mlp.up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down",
                "input_layernorm": "attn_norm",
                "post_attention_layernorm": "ffn_norm",
            }.items()
        }
    for ours, theirs in names.items():
        writer.add_tensor(f"{theirs}.weight", interleaved(ours, tensors[f"{ours}.weight"].numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(name: str, weight: np.ndarray) -> np.ndarray:
    """Interleave the two halves of each head's rotary dimensions, as llama.cpp stores them."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.rsplit(".", 1)[-1])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def convert(gguf: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker.trainer.gguf_import", str(gguf), str(out), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_gguf_is_converted_to_an_equal_base(gguf: Path, llama: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = convert(gguf, out)
    assert ended.returncode == 0, ended.stderr
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        found, wanted = (
            load_base(folder, Quantization.NONE, compute_dtype=torch.bfloat16).model(ids).logits
            for folder in (str(out), llama)
        )
    assert torch.equal(found, wanted)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert Encoder(str(out)).stops == {0, 2}
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(llama).chat_template
    assert str(tmp_path) not in "".join(p.read_text() for p in out.iterdir() if p.suffix == ".json")
    assert "not empty" in convert(gguf, out).stderr


def test_a_truncated_file_leaves_no_folder(gguf: Path, tmp_path: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:2000])
    assert convert(gguf, tmp_path / "out").returncode != 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.gguf"]


def test_nothing_is_converted_if_the_importer_has_ended(gguf: Path, tmp_path: Path) -> None:
    dead = 2**22 + 1  # above the largest process id
    assert "the parent is gone" in convert(gguf, tmp_path / "out", "--parent", str(dead)).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.gguf"]
