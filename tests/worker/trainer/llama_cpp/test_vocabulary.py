"""Tokenizers told of in GGUF's words are rebuilt by transformers, and read as before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tests.tiny import CORPUS, tiny_tokenizer
from worker.trainer.exports.fingerprint import Unlike
from worker.trainer.exports.gguf import check_scores
from worker.trainer.llama_cpp import vocabulary

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<eos>", "<bos>", "<mask>"]
TEXTS = ["the hat of the milliner", "a  hat\n\tis", "Ünïcödé 帽子 🎩 don't", "12345 3.14"]


def learned() -> dict[str, Any]:
    """SentencePiece's BPE: pieces that begin with a space's stand-in, bytes for what no piece has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}


@pytest.mark.parametrize(
    ("architecture", "tokenizer_class", "prefix"), [("llama", LlamaTokenizer, True), ("gemma2", GemmaTokenizer, False)]
)
def test_sentencepiece_is_rebuilt_from_scores(
    tmp_path: Path, architecture: str, tokenizer_class: Any, prefix: bool
) -> None:
    tokenizer = tokenizer_class(**learned())
    words, theirs = rebuilt(tmp_path, tokenizer, architecture, size=len(tokenizer) + 2)
    assert (words.kind, words.pre, words.add_space_prefix) == ("llama", "default", prefix)
    assert words.types[-1] is TokenType.UNUSED
    assert words.types[words.tokens.index("<0x0A>")] is TokenType.BYTE
    assert words.types[words.tokens.index("</s>" if prefix else "<eos>")] is TokenType.CONTROL
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert words.scores is not None
    first, last = (words.scores[words.tokens.index(words.merges[i].replace(" ", ""))] for i in (0, -1))
    assert first > last


@pytest.mark.parametrize("tokenizer_class", [LlamaTokenizer, GemmaTokenizer])
def test_llama_cpp_reads_by_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_class: Any) -> None:
    """transformers' reader takes the merges, and would not see it if they were wrong."""
    tokenizer, right = tokenizer_class(**learned()), vocabulary.of
    rebuilt(tmp_path, tokenizer, "llama", size=len(tokenizer))
    check_scores(tmp_path / "words.gguf", tokenizer, [*CORPUS, *TEXTS, "athat"])

    def wrong(*args: Any) -> vocabulary.Vocabulary:
        found = right(*args)
        return replace(found, scores=[-score for score in found.scores or []])

    monkeypatch.setattr(vocabulary, "of", wrong)
    rebuilt(tmp_path, tokenizer, "llama", size=len(tokenizer))
    with pytest.raises(Unlike, match="by its scores"):
        check_scores(tmp_path / "words.gguf", tokenizer, ["athat"])


def test_gemmas_runs_of_spaces_are_spaces(tmp_path: Path) -> None:
    """llama.cpp looks for them in the text before it puts stand-ins for spaces; so does transformers' reader."""
    known = learned()
    known["vocab"]["▁▁"] = len(known["vocab"])
    known["merges"].insert(0, ("▁", "▁"))
    tokenizer = GemmaTokenizer(**known)
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False, special=False)])
    words, theirs = rebuilt(tmp_path, tokenizer, "gemma2", size=len(tokenizer))
    run = known["vocab"]["▁▁"]
    assert (words.tokens[run], words.types[run]) == ("  ", TokenType.USER_DEFINED)
    assert run in tokenizer(TEXTS[1])["input_ids"] == theirs(TEXTS[1])["input_ids"]


@pytest.mark.parametrize("pre", ["gpt-2", *vocabulary.SPLITS])
def test_byte_level_bpe_is_known_by_how_it_cuts_text(tmp_path: Path, pre: str) -> None:
    tokenizer = tiny_tokenizer()
    if pre != "gpt-2":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    words, theirs = rebuilt(tmp_path, tokenizer, "llama", size=330)
    assert (words.kind, words.pre, words.scores) == ("gpt2", pre, None)
    for text in [*TEXTS, "<|im_start|>user\nthe hat<|im_end|>\n"]:
        assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert theirs.chat_template == tokenizer.chat_template
    assert theirs.eos_token_id == tokenizer.eos_token_id == 2


def test_a_turn_that_ends_by_another_token_than_a_text(tmp_path: Path) -> None:
    rebuilt(tmp_path, tiny_tokenizer(), "llama", size=320, stops=frozenset({0, 2}))
    fields = GGUFReader(tmp_path / "words.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 0
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_a_base_with_several_chat_templates(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": "{{ messages }}"}
    _, theirs = rebuilt(tmp_path, tokenizer, "llama", size=320)
    assert theirs.chat_template == vocabulary.template(tokenizer) == "{{ messages }}"
    fields = GGUFReader(tmp_path / "words.gguf").fields
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"


def rebuilt(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    architecture: str,
    *,
    size: int,
    stops: frozenset[int] = frozenset(),
) -> tuple[vocabulary.Vocabulary, Any]:
    """Its words, and the tokenizer that transformers makes of the file they are in."""
    words = vocabulary.of(tokenizer, size)
    assert len(words.tokens) == len(words.types) == size
    writer = GGUFWriter(folder / "words.gguf", architecture)
    vocabulary.write(writer, words, tokenizer, stops)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return words, AutoTokenizer.from_pretrained(folder, gguf_file="words.gguf")
