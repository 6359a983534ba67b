"""transformers rebuilds a tokenizer from its GGUF form, and the rebuilt one gives the same ids."""

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
from worker.trainer.exports.fingerprint import Mismatch
from worker.trainer.exports.gguf import check_scores
from worker.trainer.llama_cpp import vocabulary

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<eos>", "<bos>", "<mask>"]
TEXTS = ["the hat of the milliner", "a  hat\n\tis", "Ünïcödé 帽子 🎩 don't", "12345 3.14"]


def sentencepiece_model() -> dict[str, Any]:
    """Vocabulary and merges in SentencePiece's form: "▁" for a space, and byte tokens for unknown characters."""
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
    tokenizer = tokenizer_class(**sentencepiece_model())
    written, rebuilt = rebuild(tmp_path, tokenizer, architecture, size=len(tokenizer) + 2)
    assert (written.kind, written.pre, written.add_space_prefix) == ("llama", "default", prefix)
    assert written.types[-1] is TokenType.UNUSED
    assert written.types[written.tokens.index("<0x0A>")] is TokenType.BYTE
    assert written.types[written.tokens.index("</s>" if prefix else "<eos>")] is TokenType.CONTROL
    for text in TEXTS:
        assert rebuilt(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert written.scores is not None
    first, last = (written.scores[written.tokens.index(written.merges[i].replace(" ", ""))] for i in (0, -1))
    assert first > last


@pytest.mark.parametrize("tokenizer_class", [LlamaTokenizer, GemmaTokenizer])
def test_scores_agree_with_the_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_class: Any) -> None:
    """Wrong scores must be found here: transformers' reader uses the merges and ignores the scores."""
    tokenizer, correct = tokenizer_class(**sentencepiece_model()), vocabulary.of
    rebuild(tmp_path, tokenizer, "llama", size=len(tokenizer))
    check_scores(tmp_path / "tokenizer.gguf", tokenizer, [*CORPUS, *TEXTS, "athat"])

    def negated(*args: Any) -> vocabulary.Vocabulary:
        found = correct(*args)
        return replace(found, scores=[-score for score in found.scores or []])

    monkeypatch.setattr(vocabulary, "of", negated)
    rebuild(tmp_path, tokenizer, "llama", size=len(tokenizer))
    with pytest.raises(Mismatch, match="its scores tokenize"):
        check_scores(tmp_path / "tokenizer.gguf", tokenizer, ["athat"])


def test_gemmas_tokens_of_several_spaces_are_written_as_spaces(tmp_path: Path) -> None:
    """llama.cpp looks for them in the text before it replaces spaces by "▁". transformers' reader does the same."""
    known = sentencepiece_model()
    known["vocab"]["▁▁"] = len(known["vocab"])
    known["merges"].insert(0, ("▁", "▁"))
    tokenizer = GemmaTokenizer(**known)
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False, special=False)])
    written, rebuilt = rebuild(tmp_path, tokenizer, "gemma2", size=len(tokenizer))
    run = known["vocab"]["▁▁"]
    assert (written.tokens[run], written.types[run]) == ("  ", TokenType.USER_DEFINED)
    assert run in tokenizer(TEXTS[1])["input_ids"] == rebuilt(TEXTS[1])["input_ids"]


@pytest.mark.parametrize("pre", ["gpt-2", *vocabulary.SPLITS])
def test_byte_level_bpe_gets_the_name_of_its_pre_tokenizer(tmp_path: Path, pre: str) -> None:
    tokenizer = tiny_tokenizer()
    if pre != "gpt-2":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    written, rebuilt = rebuild(tmp_path, tokenizer, "llama", size=330)
    assert (written.kind, written.pre, written.scores) == ("gpt2", pre, None)
    for text in [*TEXTS, "<|im_start|>user\nthe hat<|im_end|>\n"]:
        assert rebuilt(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert rebuilt.chat_template == tokenizer.chat_template
    assert rebuilt.eos_token_id == tokenizer.eos_token_id == 2


def test_another_stop_token_is_written_as_the_end_of_turn(tmp_path: Path) -> None:
    rebuild(tmp_path, tiny_tokenizer(), "llama", size=320, stops=frozenset({0, 2}))
    fields = GGUFReader(tmp_path / "tokenizer.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 0
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_all_of_several_chat_templates_are_written(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": "{{ messages }}"}
    _, rebuilt = rebuild(tmp_path, tokenizer, "llama", size=320)
    assert rebuilt.chat_template == vocabulary.template(tokenizer) == "{{ messages }}"
    fields = GGUFReader(tmp_path / "tokenizer.gguf").fields
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"


def rebuild(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    architecture: str,
    *,
    size: int,
    stops: frozenset[int] = frozenset(),
) -> tuple[vocabulary.Vocabulary, Any]:
    """Write the tokenizer to a GGUF file. Returns its GGUF form, and what transformers rebuilds from the file."""
    written = vocabulary.of(tokenizer, size)
    assert len(written.tokens) == len(written.types) == size
    writer = GGUFWriter(folder / "tokenizer.gguf", architecture)
    vocabulary.write(writer, written, tokenizer, stops)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return written, AutoTokenizer.from_pretrained(folder, gguf_file="tokenizer.gguf")
