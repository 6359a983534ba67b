"""Write an adapter or a merged model as GGUF, and read the file back with other people's code.

Owns: the order of a file's parts, and the check that it reads back as it was written. Tensors are written one at a
time, so that no second copy is in memory. Names and layouts are in `worker/trainer/llama_cpp`.
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
from worker.trainer.exports.fingerprint import Mismatch
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
#: Characters of a word that are checked. In a language without spaces, a whole text is one word.
LONGEST_WORD = 64
TENSOR_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
#: Ends of names of tensors that llama.cpp reads in fp32 only. Vectors are also fp32.
FP32 = ("position_embd.weight", "_norm.weight")

Tensors = dict[str, torch.Tensor]


def write_adapter(path: Path, tensors: Tensors, config: PretrainedConfig, task: Task, recipe: Recipe) -> None:
    """Write a LoRA for llama.cpp's `--lora`, in fp32. `tensors` are under PEFT's keys."""
    writer = GGUFWriter(path, forms.FORMS[config.model_type].name)
    _describe(writer, GGUFType.ADAPTER, task)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, _alpha(recipe))
    _write(writer, lambda: _lora_tensors(tensors, config))


def check_adapter(path: Path, tensors: Tensors, config: PretrainedConfig, recipe: Recipe) -> None:
    """Raise Mismatch unless the file has the adapter's tensors, bit for bit, and its alpha.

    The `gguf` package reads the file, and transformers maps names and layouts back.
    """
    reader = GGUFReader(path)
    alpha = reader.fields[Keys.Adapter.LORA_ALPHA].contents()
    if not math.isclose(alpha, _alpha(recipe), rel_tol=1e-6):
        raise Mismatch(f"its alpha is read as {alpha}; expected {_alpha(recipe)}")
    form = forms.FORMS[config.model_type]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(_config_as_read(config))
    processor = _processor(form, config)
    theirs = get_gguf_hf_weights_map(skeleton, processor)
    found: Tensors = {}
    for tensor in reader.tensors:
        name, _, part = tensor.name.rpartition(".lora_")
        values = np.array(tensor.data)
        if part == "b" and form.interleaves_rotary:
            values = processor.process(values, name).weights
        module = theirs.get(name, name).removesuffix(".weight")
        found[f"{PEFT_PREFIX}{module}.lora_{part.upper()}.weight"] = torch.from_numpy(values)
    if differing := [
        key for key in sorted(found.keys() | tensors.keys()) if not _same(found.get(key), tensors.get(key))
    ]:
        raise Mismatch(f"{len(differing)} of {len(tensors)} tensors differ when read back, such as {differing[0]}")


def write_model(path: Path, merged: PreTrainedModel, task: Task, encoder: Encoder) -> None:
    """Write a whole model in its own type, vectors in fp32, with its tokenizer and chat template."""
    config = merged.config
    writer = GGUFWriter(path, forms.FORMS[config.model_type].name)
    _describe(writer, GGUFType.MODEL, task)
    writer.add_file_type(FILE_TYPES[merged.dtype])
    forms.write_hyperparameters(writer, config)
    words = vocabulary.of(encoder.tokenizer, config.vocab_size)
    vocabulary.write(writer, words, encoder.tokenizer, encoder.stops)
    _write(writer, lambda: _model_tensors(merged))


def read_model(path: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the file with transformers' GGUF reader. Raises Mismatch if a hyperparameter differs from `config`.

    That reader takes fewer hyperparameters from a file than llama.cpp does; the others come from `config`.
    """
    for key, value in load_gguf_checkpoint(path)["config"].items():
        if key.endswith("_token_id"):
            continue  # these come from the tokenizer, which may differ from the config
        wanted = forms.rope_theta(config) if key == "rope_theta" else getattr(config, key, value)
        if isinstance(value, int | float) and wanted is not None and not math.isclose(value, wanted, rel_tol=1e-6):
            raise Mismatch(f"its {key} is read as {value}; expected {wanted}")
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=_config_as_read(config),
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=False,
    )
    return found


def check_tokenizer(path: Path, written: vocabulary.Vocabulary, encoder: Encoder, texts: list[str]) -> None:
    """Raise Mismatch unless the tokenizer that transformers rebuilds from the file agrees with the base's.

    They must give the same ids for all `texts`, and have the same chat template and special tokens.
    """
    rebuilt = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if written.pre in vocabulary.IGNORE_MERGES:
        rebuilt.backend_tokenizer.model.ignore_merges = True  # llama.cpp infers this from the pre-tokenizer's name
    for text in texts:
        wanted, found = encoder.tokenizer(text)["input_ids"], rebuilt(text)["input_ids"]
        if wanted != found:
            i = next(
                (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found))
            )
            raise Mismatch(
                f"its tokenizer gives other ids for a text from token {i} on: {found[i : i + 3]}; "
                f"expected {wanted[i : i + 3]}"
            )
    if written.scores is not None:
        check_scores(path, encoder.tokenizer, texts)
    if rebuilt.chat_template != (template := vocabulary.template(encoder.tokenizer)):
        raise Mismatch(f"its chat template is read as {rebuilt.chat_template!r}; expected {template!r}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        wanted, found = getattr(encoder.tokenizer, name), getattr(rebuilt, name)
        if wanted is not None and wanted != found:
            raise Mismatch(f"its {name} is read as {found!r}; expected {wanted!r}")


def check_scores(path: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Raise Mismatch unless the file's scores tokenize the words of `texts` as the base does, by llama.cpp's rule.

    transformers' reader uses the merges in the file and ignores the scores, so `check_tokenizer` cannot check them.
    """
    fields, backend = GGUFReader(path).fields, tokenizer.backend_tokenizer
    tokens, scores = (fields[key].contents() for key in (Keys.Tokenizer.LIST, Keys.Tokenizer.SCORES))
    ids = {token: i for i, token in enumerate(tokens)}
    # Both look for added tokens in the text first, so words are the text between them.
    added = sorted((token.content for token in backend.get_added_tokens_decoder().values()), key=len, reverse=True)
    between = re.compile("|".join([*map(re.escape, added), r"\s+"]))
    for word in sorted({f"{vocabulary.SPACE}{word[:LONGEST_WORD]}" for text in texts for word in between.split(text)}):
        wanted, found = [token.id for token in backend.model.tokenize(word)], sentencepiece.tokenize(word, ids, scores)
        if wanted != found:
            raise Mismatch(f"its scores tokenize {word!r} as {found}; expected {wanted}")


def _describe(writer: GGUFWriter, kind: str, task: Task) -> None:
    writer.add_type(kind)
    writer.add_name(task.base_name)
    if task.base_license is not None:
        writer.add_license(task.base_license)


def _alpha(recipe: Recipe) -> float:
    """The alpha to write: llama.cpp scales by alpha / r, and rsLoRA by alpha / sqrt(r)."""
    return recipe.alpha * (math.sqrt(recipe.r) if recipe.use_rslora else 1.0)


def _lora_tensors(tensors: Tensors, config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    name_of = forms.names(config)
    for key, tensor in sorted(tensors.items()):
        module, _, part = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".lora_")
        named = _known(name_of(module), module)
        converted = forms.interleave_rotary(f"{module}.weight", tensor, config) if part == "B" else tensor
        yield f"{named}.weight.lora_{part.lower()}", converted.float()


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
        converted = forms.to_llama_cpp_layout(name, tensor, merged.config)
        yield named, converted.float() if converted.ndim == 1 or named.endswith(FP32) else converted


def _known(name: str | None, ours: str) -> str:
    if name is None:
        raise Mismatch(f"llama.cpp has no name for {ours}")
    return name


def _write(writer: GGUFWriter, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    """Write header, metadata and tensors. Names and shapes of all tensors come first in a file.

    So `tensors` is called twice, instead of keeping all converted tensors in memory.
    """
    for name, tensor in tensors():
        kind, stored = TENSOR_TYPES[tensor.dtype], _array(tensor[:0]).dtype
        writer.add_tensor_info(name, list(tensor.shape), stored, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors():
        writer.write_tensor_data(_array(tensor))
    writer.close()


def _array(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The tensor as a NumPy array. NumPy has no bf16, so its bits are given as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    array: npt.NDArray[np.generic] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _config_as_read(config: PretrainedConfig) -> PretrainedConfig:
    """The config as a reader of the file sees it: llama.cpp has no Mistral, and stores one as a Llama."""
    if config.model_type != "mistral":
        return config
    shared = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return LlamaConfig.from_dict(shared)


def _processor(form: forms.Form, config: PretrainedConfig) -> TensorProcessor:
    """transformers' conversion from llama.cpp's layout."""
    made: TensorProcessor = TENSOR_PROCESSORS.get(form.name, TensorProcessor)(config=config.to_dict())
    return made


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other.float())
