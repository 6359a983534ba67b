"""Read a model's architecture from its config.json: linear modules by path, parameter counts, bytes kept for a token.

Owns: which architectures are known, their arithmetic, and the context length of any base.
tests/shared/estimation/test_architecture.py counts the real modules. Pure: reads a dict, no file. Must not know about
quantization, datasets or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shared.errors import InvalidRequest

Config = Mapping[str, Any]

#: Positions where a config.json does not name them: the default of the transformers class.
DEFAULT_POSITIONS = {"gpt2": 1024, "bert": 512, "roberta": 512, "deberta-v2": 512}
#: RoBERTa and its relatives: the first position is the one after the padding token's id.
POSITIONS_AFTER_PADDING = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod"),
        *("mpnet", "longformer", "luke", "ibert", "esm", "markuplm", "lilt", "layoutlmv3"),
    }
)
#: Their padding token's id where a config.json does not name it.
DEFAULT_PADDING = 1


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix that quantization packs and that can have a LoRA (GPT-2's Conv1D too). `path` is its module's name."""

    path: str
    inputs: int
    outputs: int

    @property
    def elements(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model in numbers. Parameters are linear + embedding + head + classifier + other, each counted once.

    `head`: the output projection, 0 if it is tied to the embedding. `classifier`: the parameters of a classification
    head, which are trained in full. `other`: norms, biases and convolutions.
    `stored`: bytes that a layer keeps of a token for its backward, in 16-bit training without a LoRA.
    `scores`: bytes kept in addition for each head and attended token, 0 if attention is a fused kernel.
    `query`: width of all query heads together. `context`: longest row in tokens, None if there is no limit.
    """

    model_type: str
    layers: int
    hidden: int
    query: int
    heads: int
    feed_forward: int
    vocabulary: int
    context: int | None
    causal: bool
    linears: tuple[Linear, ...]
    embedding: int
    head: int
    classifier: int
    other: int
    stored: int
    scores: int
    caps_logits: bool = False

    @property
    def linear(self) -> int:
        return sum(linear.elements for linear in self.linears)

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.head + self.classifier + self.other


def read_config(config: Config) -> Architecture:
    """Read a config.json. Raises InvalidRequest: an unknown architecture, a missing or invalid size."""
    model_type = config.get("model_type")
    reader = READERS.get(str(model_type))
    if reader is None:
        raise _unsupported(f"found model_type {model_type!r}; known are {', '.join(sorted(READERS))}")
    try:
        base = reader(config)
        if min(base.layers, base.hidden, base.heads, base.feed_forward, base.vocabulary) < 1:
            raise ValueError("a size below 1")
        return base
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unsupported(f"this config.json of a {model_type} cannot be read: {error!r}") from error


def classifier(base: Architecture, *, labels: int = 2) -> Architecture:
    """The base as it is trained to classify: a head with one row a label replaces a decoder's output projection."""
    return replace(base, head=0, classifier=labels * base.hidden) if base.causal else base


def context_length(config: Config) -> int | None:
    """Most tokens that a base of any architecture can attend to. None: its config.json names no limit."""
    model_type = config.get("model_type")
    named = config.get("max_position_embeddings") or config.get("n_positions")
    positions = named or DEFAULT_POSITIONS.get(str(model_type))
    if positions is None:
        return None
    if model_type in POSITIONS_AFTER_PADDING:
        return int(positions) - (config.get("pad_token_id", DEFAULT_PADDING) or 0) - 1
    return int(positions)


# ---------------------------------------------------------------- decoders


@dataclass(frozen=True, slots=True)
class _Decoder:
    """How one relative of Llama differs from it. Defaults are those of its transformers class."""

    tied: bool = False
    head_dim: int | None = None
    qkv_bias: bool = False
    optional_bias: bool = False
    query_key_norm: bool = False
    norms: int = 2
    score_cap: float | None = None


_LLAMAS = {
    "llama": _Decoder(optional_bias=True),
    "mistral": _Decoder(),
    "qwen2": _Decoder(qkv_bias=True),
    "qwen3": _Decoder(head_dim=128, optional_bias=True, query_key_norm=True),
    "gemma": _Decoder(tied=True, head_dim=256, optional_bias=True),
    "gemma2": _Decoder(tied=True, head_dim=256, optional_bias=True, norms=4, score_cap=50.0),
    "gemma3_text": _Decoder(tied=True, head_dim=256, optional_bias=True, norms=4, query_key_norm=True),
}


def _llama(config: Config) -> Architecture:
    """Gated feed-forward, grouped queries, RMS norms, rotary positions."""
    kind = _LLAMAS[config["model_type"]]
    layers, h, f, v = (
        int(config[name]) for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    )
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or kind.head_dim or h // heads)
    q, k = heads * width, groups * width
    attention_bias = kind.optional_bias and bool(config.get("attention_bias", False))
    feed_forward_bias = kind.optional_bias and bool(config.get("mlp_bias", False))
    biases = (q + 2 * k) * (kind.qkv_bias or attention_bias) + h * attention_bias + (2 * f + h) * feed_forward_bias
    norms = kind.norms * h + 2 * width * kind.query_key_norm
    shapes = (
        ("self_attn.q_proj", h, q),
        ("self_attn.k_proj", h, k),
        ("self_attn.v_proj", h, k),
        ("self_attn.o_proj", q, h),
        ("mlp.gate_proj", h, f),
        ("mlp.up_proj", h, f),
        ("mlp.down_proj", f, h),
    )
    stored = (10 + 4 * kind.norms) * h + 6 * q + 4 * k + 8 * f + 4 * heads
    return Architecture(
        model_type=config["model_type"],
        layers=layers,
        hidden=h,
        query=q,
        heads=heads,
        feed_forward=f,
        vocabulary=v,
        context=context_length(config),
        causal=True,
        linears=_repeated("model.layers", layers, shapes),
        embedding=v * h,
        head=0 if config.get("tie_word_embeddings", kind.tied) else v * h,
        classifier=0,
        other=layers * (norms + biases) + h,
        stored=stored + (4 * (q + k) + 4 * (heads + groups)) * kind.query_key_norm,
        # Gemma 2 caps the scores; no fused kernel of transformers supports that.
        scores=8 if config.get("attn_logit_softcapping", kind.score_cap) else 0,
        caps_logits=bool(config.get("final_logit_softcapping", kind.score_cap)),
    )


def _gpt2(config: Config) -> Architecture:
    """One fused matrix for query, key and value; learned positions; biases everywhere."""
    layers, h, v = (int(config[name]) for name in ("n_layer", "n_embd", "vocab_size"))
    heads, f = int(config["n_head"]), int(config.get("n_inner") or 4 * h)
    positions = int(config.get("n_positions", DEFAULT_POSITIONS["gpt2"]))
    shapes = (("attn.c_attn", h, 3 * h), ("attn.c_proj", h, h), ("mlp.c_fc", h, f), ("mlp.c_proj", f, h))
    return Architecture(
        model_type="gpt2",
        layers=layers,
        hidden=h,
        query=h,
        heads=heads,
        feed_forward=f,
        vocabulary=v,
        context=context_length(config),
        causal=True,
        linears=_repeated("transformer.h", layers, shapes),
        embedding=(v + positions) * h,
        head=0 if config.get("tie_word_embeddings", True) else v * h,
        classifier=0,
        other=layers * (4 * h + 3 * h + h + f + h) + 2 * h,
        stored=(26 if config.get("resid_pdrop", 0.1) else 18) * h + 10 * f + 4 * heads,
        scores=0,
    )


# ---------------------------------------------------------------- encoders, as sequence classifiers


def _bert(config: Config) -> Architecture:
    """BERT and RoBERTa. The dense layer that BERT calls pooler is in RoBERTa a trained part of the classifier."""
    name = config["model_type"]
    layers, h, f, heads, v = _encoder_sizes(config)
    positions = int(config.get("max_position_embeddings", DEFAULT_POSITIONS[name]))
    shapes = (
        ("attention.self.query", h, h),
        ("attention.self.key", h, h),
        ("attention.self.value", h, h),
        ("attention.output.dense", h, h),
        ("intermediate.dense", h, f),
        ("output.dense", f, h),
    )
    pooler = () if name == "roberta" else (Linear(f"{name}.pooler.dense", h, h),)
    labels = _labels(config)
    return Architecture(
        model_type=name,
        layers=layers,
        hidden=h,
        query=h,
        heads=heads,
        feed_forward=f,
        vocabulary=v,
        context=context_length(config),
        causal=False,
        linears=_repeated(f"{name}.encoder.layer", layers, shapes) + pooler,
        embedding=(v + positions + int(config.get("type_vocab_size", 2))) * h,
        head=0,
        classifier=labels * (h + 1) + (0 if pooler else h * h + h),
        other=2 * h + layers * (9 * h + f) + (h if pooler else 0),
        stored=(30 if config.get("hidden_dropout_prob", 0.1) else 22) * h + 4 * f + 4 * heads,
        scores=0,
    )


def _deberta(config: Config) -> Architecture:
    """DeBERTa v2 and v3: relative positions add two terms to the scores; no fused kernel supports them."""
    layers, h, f, heads, v = _encoder_sizes(config)
    positions = int(config.get("max_position_embeddings", DEFAULT_POSITIONS["deberta-v2"]))
    relative = bool(config.get("relative_attention", False))
    kinds = config.get("pos_att_type") or []
    own_positions = relative and not config.get("share_att_key", False)
    projections = [
        f"pos_{key}_proj" for key, kind in (("key", "c2p"), ("query", "p2c")) if own_positions and kind in kinds
    ]
    attention = ["query_proj", "key_proj", "value_proj", *projections]
    shapes = (
        *((f"attention.self.{name}", h, h) for name in attention),
        ("attention.output.dense", h, h),
        ("intermediate.dense", h, f),
        ("output.dense", f, h),
    )
    span = int(config.get("max_relative_positions", -1))
    span = 2 * (span if span > 0 else positions)
    buckets = int(config.get("position_buckets", -1))
    span = 2 * buckets if buckets > 0 else span
    rows = v + int(config.get("type_vocab_size", 0)) + (positions if config.get("position_biased_input", True) else 0)
    kernel = int(config.get("conv_kernel_size", 0))
    convolution = kernel * h * h + 3 * h if kernel > 0 else 0
    span_norm = 2 * h if relative and "layer_norm" in str(config.get("norm_rel_ebd", "none")) else 0
    return Architecture(
        model_type="deberta-v2",
        layers=layers,
        hidden=h,
        query=h,
        heads=heads,
        feed_forward=f,
        vocabulary=v,
        context=context_length(config),
        causal=False,
        linears=_repeated("deberta.encoder.layer", layers, shapes),
        embedding=(rows + span * relative) * h,
        head=0,
        # Here the pooler is not part of the encoder, and masked language models have none.
        classifier=_labels(config) * (h + 1) + h * h + h,
        other=2 * h + layers * ((len(attention) + 6) * h + f) + convolution + span_norm,
        # The scores of every relative position, and the inputs of their products.
        stored=(24 if config.get("hidden_dropout_prob", 0.1) else 20) * h
        + 4 * f
        + relative * (14 * h + 2 * len(kinds) * heads * span),
        scores=3 + (4 if config.get("attention_probs_dropout_prob", 0.1) else 0),
    )


Reader = Callable[[Config], Architecture]
READERS: dict[str, Reader] = {
    **dict.fromkeys(_LLAMAS, _llama),
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _bert,
    "deberta-v2": _deberta,
}


def _repeated(prefix: str, layers: int, shapes: tuple[tuple[str, int, int], ...]) -> tuple[Linear, ...]:
    return tuple(
        Linear(f"{prefix}.{i}.{name}", inputs, outputs) for i in range(layers) for name, inputs, outputs in shapes
    )


def _encoder_sizes(config: Config) -> tuple[int, int, int, int, int]:
    """Layers, hidden, feed-forward, heads, vocabulary."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    layers, hidden, feed_forward, heads, vocabulary = (int(config[name]) for name in names)
    return layers, hidden, feed_forward, heads, vocabulary


def _labels(config: Config) -> int:
    return int(config.get("num_labels") or len(config.get("id2label") or ()) or 2)


def _unsupported(message: str) -> InvalidRequest:
    return InvalidRequest(
        f"the base's memory and time cannot be predicted: {message}", param="model", code="unsupported_base_model"
    )
