"""GGUF files of an adapter and of a merged model, and reading them again by code that is not ours.

Owns: the order of a file, and that what is read back is what was to be written. Tensors are written one at a time, so
that nothing is held twice. What things are called is in `llama_cpp.py` and `vocabulary.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, Keys, LlamaFileType
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from shared.schemas.results import Recipe
from worker.trainer.data.encoding import Encoder
from worker.trainer.exports.fingerprint import Unlike
from worker.trainer.llama_cpp import forms, sentencepiece, vocabulary
from worker.trainer.protocol import Task

ADAPTER = "adapter.gguf"
MODEL = "model.gguf"
PEFT_PREFIX = "base_model.model."
FILE_TYPES = {
    torch.float32: LlamaFileType.ALL_F32,
    torch.float16: LlamaFileType.MOSTLY_F16,
    torch.bfloat16: LlamaFileType.MOSTLY_BF16,
}
#: In letters: where a language has no spaces, a text is one word.
LONGEST_WORD = 64
TENSOR_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
#: What llama.cpp reads in fp32 alone, besides all that has one dimension.
FP32 = ("position_embd.weight", "_norm.weight")

Tensors = dict[str, torch.Tensor]


def write_adapter(path: Path, tensors: Tensors, config: PretrainedConfig, task: Task, recipe: Recipe) -> None:
    """`tensors` under the keys of the PEFT format, in fp32 as they are."""
    writer = GGUFWriter(path, forms.FORMS[config.model_type].name)
    _describe(writer, GGUFType.ADAPTER, task)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, _alpha(recipe))
    _write(writer, lambda: _lora_tensors(tensors, config))


def check_adapter(path: Path, tensors: Tensors, config: PretrainedConfig, recipe: Recipe) -> None:
    """Read by the `gguf` package, mapped back by transformers, and bit for bit the adapter's. Raises Unlike."""
    reader = GGUFReader(path)
    alpha = reader.fields[Keys.Adapter.LORA_ALPHA].contents()
    if not math.isclose(alpha, _alpha(recipe), rel_tol=1e-6):
        raise Unlike(f"its alpha is read as {alpha}, the adapter's comes to {_alpha(recipe)}")
    form = forms.FORMS[config.model_type]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(_as_read(config))
    processor = _processor(form, config)
    theirs = get_gguf_hf_weights_map(skeleton, processor)
    found: Tensors = {}
    for tensor in reader.tensors:
        name, _, part = tensor.name.rpartition(".lora_")
        values = np.array(tensor.data)
        if part == "b" and form.pairs_rotary:
            values = processor.process(values, name).weights
        module = theirs.get(name, name).removesuffix(".weight")
        found[f"{PEFT_PREFIX}{module}.lora_{part.upper()}.weight"] = torch.from_numpy(values)
    if differing := [
        key for key in sorted(found.keys() | tensors.keys()) if not _same(found.get(key), tensors.get(key))
    ]:
        raise Unlike(f"{len(differing)} of {len(tensors)} tensors come back otherwise, {differing[0]} for one")


def write_model(path: Path, merged: PreTrainedModel, task: Task, encoder: Encoder) -> None:
    """The whole of a model in its own type, norms and biases in fp32, with the tokenizer and the chat template."""
    config = merged.config
    writer = GGUFWriter(path, forms.FORMS[config.model_type].name)
    _describe(writer, GGUFType.MODEL, task)
    writer.add_file_type(FILE_TYPES[merged.dtype])
    forms.write_hyperparameters(writer, config)
    words = vocabulary.of(encoder.tokenizer, config.vocab_size)
    vocabulary.write(writer, words, encoder.tokenizer, encoder.stops)
    _write(writer, lambda: _model_tensors(merged))


def read_model(path: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """By transformers' reader of GGUF, which takes fewer hyperparameters from a file than llama.cpp does: the rest come
    from `config`, and those that it does take must agree with that. Raises Unlike.
    """
    for key, value in load_gguf_checkpoint(path)["config"].items():
        if key.endswith("_token_id"):
            continue  # the tokenizer's, with which a config need not agree
        wanted = forms.rope_theta(config) if key == "rope_theta" else getattr(config, key, value)
        if isinstance(value, int | float) and wanted is not None and not math.isclose(value, wanted, rel_tol=1e-6):
            raise Unlike(f"its {key} is read as {value}, the model's is {wanted}")
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=_as_read(config),
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=False,
    )
    return found


def check_tokenizer(path: Path, words: vocabulary.Vocabulary, encoder: Encoder, texts: list[str]) -> None:
    """The tokenizer that transformers rebuilds from the file reads every text as the base's does. Raises Unlike."""
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if words.pre in vocabulary.IGNORE_MERGES:
        theirs.backend_tokenizer.model.ignore_merges = True  # llama.cpp knows it by the pre-tokenizer's name
    for text in texts:
        wanted, read = encoder.tokenizer(text)["input_ids"], theirs(text)["input_ids"]
        if wanted != read:
            i = next(
                (i for i, (a, b) in enumerate(zip(wanted, read, strict=False)) if a != b), min(len(wanted), len(read))
            )
            raise Unlike(
                f"its tokenizer reads a text otherwise from token {i} on: {read[i : i + 3]}, wanted {wanted[i : i + 3]}"
            )
    if words.scores is not None:
        check_scores(path, encoder.tokenizer, texts)
    if theirs.chat_template != (told := vocabulary.template(encoder.tokenizer)):
        raise Unlike(f"its chat template is read as {theirs.chat_template!r}, the base's is {told!r}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        wanted, read = getattr(encoder.tokenizer, name), getattr(theirs, name)
        if wanted is not None and wanted != read:
            raise Unlike(f"its {name} is read as {read!r}, the base's is {wanted!r}")


def check_scores(path: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """By the scores in the file llama.cpp reads the words of `texts` as the base's merges do, which transformers takes
    from the file as well. Raises Unlike.
    """
    fields, backend = GGUFReader(path).fields, tokenizer.backend_tokenizer
    tokens, scores = (fields[key].contents() for key in (Keys.Tokenizer.LIST, Keys.Tokenizer.SCORES))
    ids = {token: i for i, token in enumerate(tokens)}
    # What was added to the vocabulary is looked for in the text first, by both.
    added = sorted((token.content for token in backend.get_added_tokens_decoder().values()), key=len, reverse=True)
    between = re.compile("|".join([*map(re.escape, added), r"\s+"]))
    for word in sorted({f"{vocabulary.SPACE}{word[:LONGEST_WORD]}" for text in texts for word in between.split(text)}):
        wanted, read = [token.id for token in backend.model.tokenize(word)], sentencepiece.read(word, ids, scores)
        if wanted != read:
            raise Unlike(f"by its scores {word!r} is read as {read}, the base reads {wanted}")


def _describe(writer: GGUFWriter, kind: str, task: Task) -> None:
    writer.add_type(kind)
    writer.add_name(task.base_name)
    if task.base_license is not None:
        writer.add_license(task.base_license)


def _alpha(recipe: Recipe) -> float:
    """llama.cpp scales by alpha / r, rsLoRA by alpha / sqrt(r)."""
    return recipe.alpha * (math.sqrt(recipe.r) if recipe.use_rslora else 1.0)


def _lora_tensors(tensors: Tensors, config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    name_of = forms.names(config)
    for key, tensor in sorted(tensors.items()):
        module, _, part = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".lora_")
        named = _known(name_of(module), module)
        turned = forms.with_paired_rotary(f"{module}.weight", tensor, config) if part == "B" else tensor
        yield f"{named}.weight.lora_{part.lower()}", turned.float()


def _model_tensors(merged: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    name_of = forms.names(merged.config)
    factors = forms.rope_factors(merged.config)
    if factors is not None:
        yield forms.ROPE_FACTORS, torch.tensor(factors)
    for name, tensor in merged.state_dict().items():
        if name == "lm_head.weight" and merged.config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        named = f"{_known(name_of(module), name)}.{kind}"
        turned = forms.laid_out(name, tensor, merged.config)
        yield named, turned.float() if turned.ndim == 1 or named.endswith(FP32) else turned


def _known(name: str | None, ours: str) -> str:
    if name is None:
        raise Unlike(f"llama.cpp has no name for {ours}")
    return name


def _write(writer: GGUFWriter, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """The names and shapes of all come before the first: so `tensors` is gone through twice, and none is kept."""
    for name, tensor in tensors():
        kind, of = TENSOR_TYPES[tensor.dtype], _array(tensor[:0]).dtype
        writer.add_tensor_info(name, list(tensor.shape), of, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors():
        writer.write_tensor_data(_array(tensor))
    writer.close()


def _array(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """NumPy has no bf16: its bits, as whole numbers."""
    tensor = tensor.detach().cpu().contiguous()
    found: npt.NDArray[np.generic] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def _as_read(config: PretrainedConfig) -> PretrainedConfig:
    """To llama.cpp a Mistral is a Llama, and so it is to who reads its file."""
    if config.model_type != "mistral":
        return config
    shared = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return LlamaConfig.from_dict(shared)


def _processor(form: forms.Form, config: PretrainedConfig) -> TensorProcessor:
    """transformers' way back from llama.cpp's layout."""
    made: TensorProcessor = TENSOR_PROCESSORS.get(form.name, TensorProcessor)(config=config.to_dict())
    return made


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other.float())
