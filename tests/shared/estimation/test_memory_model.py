"""Memory and time compared with published figures, bitsandbytes' storage, and allocations measured in the trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from shared.errors import InvalidRequest
from shared.estimation import architecture, defaults, memory_model
from shared.estimation.architecture import Linear
from shared.schemas.requests import Quantization
from tests.shared.architectures import ENCODERS, LLAMA, REAL, TINY, setup_of
from worker.trainer.forward import log_likelihood
from worker.trainer.forward.batches import Batch
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import sft
from worker.trainer.model import fused_lora, short_attention

LLAMA_8B = architecture.read_config(REAL["Llama-3.1-8B"][1])
SMOL = architecture.read_config(REAL["SmolLM2-135M"][1])
GB, GIB = 1e9, 2**30


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """With a second thread, oneDNN allocates scratch buffers that the memory model does not count (1.8 MB here)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("quantization", "element_bytes", "gigabytes"),
    [
        (Quantization.NONE, 4, 32.1),
        (Quantization.NONE, 2, 16.1),
        (Quantization.INT8, 2, 9.08),
        (Quantization.NF4, 2, 5.70),
    ],
)
def test_weights_of_llama_8b(quantization: Quantization, element_bytes: int, gigabytes: float) -> None:
    found = memory_model.weights(LLAMA_8B, quantization, element_bytes=element_bytes)
    assert found / GB == pytest.approx(gigabytes, rel=0.004)


def test_adapter_of_llama_8b() -> None:
    setup = setup_of(r=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert memory_model.trained(LLAMA_8B, setup) == 27_262_976
    assert 4 * memory_model.trained(LLAMA_8B, setup) / 1e6 == pytest.approx(109.05, abs=0.01)
    assert memory_model.peak_memory(LLAMA_8B, setup).adapter == 16 * 27_262_976


def test_peak_of_torchtune() -> None:
    """QLoRA of Llama-3.1-8B at 2 x 2048: 7.4 GiB in torchtune's README, with adapters in bf16 and compiled layers.

    A compiled layer keeps no gradients between its products; our eager layers do.
    """
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    setup = setup_of(r=8, micro_batch=2, max_length=2048, target_modules=targets)
    peak = memory_model.peak_memory(LLAMA_8B, setup)
    allocated = peak.total - peak.overhead - peak.adapter // 2
    gradients = setup.tokens * (12 * LLAMA_8B.hidden + 6 * LLAMA_8B.feed_forward)
    assert (allocated - gradients) / GIB == pytest.approx(7.4, rel=0.01)
    assert allocated / GIB == pytest.approx(7.4, rel=0.08)


@pytest.mark.parametrize(
    ("base", "length", "checkpointing", "tokens_per_second", "peak_flops", "share"),
    [(LLAMA_8B, 4096, False, 12_473, 989e12, 0.42), (SMOL, 256, False, 613, 1.04e12, 0.35)],
    ids=["H100 (NeMo AutoModel)", "two cores"],
)
def test_measured_speeds_are_a_plausible_share_of_the_devices_peak(
    base: Any, length: int, checkpointing: bool, tokens_per_second: int, peak_flops: float, share: float
) -> None:
    setup = setup_of(r=16, max_length=length, checkpointing=checkpointing)
    assert memory_model.flop_per_token(base, setup) * tokens_per_second / peak_flops == pytest.approx(share, abs=0.01)


def test_a_small_adapter_costs_four_flop_a_parameter_and_checkpointing_half_as_much_again() -> None:
    exact = memory_model.flop_per_token(SMOL, setup_of(r=1, max_length=8, packing=False, checkpointing=False))
    assert exact / (4 * SMOL.total) == pytest.approx(1, abs=0.02)
    recomputed = memory_model.flop_per_token(LLAMA_8B, setup_of(max_length=2048))
    once = memory_model.flop_per_token(LLAMA_8B, setup_of(max_length=2048, checkpointing=False))
    assert recomputed / once == pytest.approx(1.46, abs=0.01)


# ---------------------------------------------------------------- stored weights


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 128), (64, 65), (576, 1536)])
def test_nf4_bytes_equal_those_that_bitsandbytes_stores(inputs: int, outputs: int) -> None:
    module = Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = module.weight.quant_state
    tensors = [module.weight, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
    assert stored(Quantization.NF4, inputs, outputs) == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors
    )


def test_int8_bytes_equal_those_that_bitsandbytes_stores() -> None:
    weight = Linear8bitLt(96, 128, bias=False, has_fp16_weights=False).to("cpu").weight
    tensors = [weight, weight.SCB]
    assert stored(Quantization.INT8, 96, 128) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stored(quantization: Quantization, inputs: int, outputs: int) -> int:
    with_linear, without = (
        architecture.Architecture("llama", 1, 8, 8, 1, 8, 8, None, True, linears, 64, 0, 0, 8, 0, 0)
        for linears in ((Linear("x", inputs, outputs),), ())
    )
    return memory_model.weights(with_linear, quantization) - memory_model.weights(without, quantization)


# ---------------------------------------------------------------- measured allocations


WIDE = {"hidden_size": 128, "intermediate_size": 448, "head_dim": 32, "num_hidden_layers": 3}
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
GPT2 = {"vocab_size": 100, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_inner": 448, "n_positions": 512}


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", LLAMA | WIDE),
        ("llama", LLAMA | WIDE | {"vocab_size": 4000}),
        ("qwen3", LLAMA | WIDE),
        ("gemma2", LLAMA | WIDE),
        ("gemma3_text", LLAMA | WIDE),
        ("gpt2", GPT2 | NO_DROPOUT),
    ],
    ids=["llama", "llama-head", "qwen3", "gemma2", "gemma3", "gpt2"],
)
def test_the_peak_is_what_the_trainers_loss_allocates(
    model_type: str, config: dict[str, Any], checkpointing: bool
) -> None:
    base = architecture.read_config({"model_type": model_type} | config)
    setup = setup_of(
        quantization=Quantization.NONE, r=8, micro_batch=2, max_length=256, checkpointing=checkpointing, device="cpu"
    )
    peak = memory_model.peak_memory(base, setup)
    assert allocated(model_type, config, setup) == pytest.approx(peak.activations + peak.head, rel=0.05)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "deberta-v3"])
def test_the_peak_of_an_encoder_is_what_its_loss_allocates(name: str, checkpointing: bool) -> None:
    """Without dropout: with it, a CPU keeps the attention scores, which a GPU's kernel does not."""
    model_type, config = TINY[name]
    config = config | {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 3, "position_buckets": 128}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 512}
    base = architecture.read_config({"model_type": model_type} | config)
    setup = setup_of(
        quantization=Quantization.NONE, r=8, micro_batch=4, max_length=256, checkpointing=checkpointing, device="cpu"
    )
    peak = memory_model.peak_memory(base, setup)
    assert allocated(model_type, config, setup) == pytest.approx(peak.activations + peak.head, rel=0.15)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
def test_fused_layers_on_a_cpu_allocate_less_than_predicted(checkpointing: bool) -> None:
    """The memory model counts PEFT's layers and torch's attention, which a GPU uses."""
    config = LLAMA | WIDE
    base = architecture.read_config({"model_type": "llama"} | config)
    setup = setup_of(
        quantization=Quantization.NONE, r=8, micro_batch=2, max_length=256, checkpointing=checkpointing, device="cpu"
    )
    peak = memory_model.peak_memory(base, setup)
    assert 0.75 < allocated("llama", config, setup, fused=True) / (peak.activations + peak.head) < 1


def allocated(model_type: str, config: dict[str, Any], setup: memory_model.Setup, *, fused: bool = False) -> int:
    """Measure the peak bytes of a packed micro-batch's forward and backward, without base and adapter.

    `fused`: with the layers that the trainer uses on a CPU.
    """
    torch.manual_seed(0)
    encoder = model_type in ENCODERS
    kind = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.bfloat16)
    model.requires_grad_(False)
    adapter = LoraConfig(
        task_type="SEQ_CLS" if encoder else "CAUSAL_LM",
        r=setup.r,
        target_modules="all-linear",
        fan_in_fan_out=model_type == "gpt2",
        modules_to_save=["classifier", "pooler"] if model_type == "deberta-v2" else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if setup.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted = get_peft_model(model, adapter).train()
    if fused:
        short_attention.use(model)
        fused_lora.fuse(adapted)
    ids = torch.randint(3, 90, (setup.micro_batch, setup.row))
    positions = torch.arange(setup.row).expand(setup.micro_batch, -1)
    layout = Layout(packing=True, chunked=model_type != "gemma2", micro_batch=setup.micro_batch, pad=0)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if encoder:
                loss = model(input_ids=ids, labels=torch.zeros(setup.micro_batch, dtype=torch.long)).loss
            else:
                batch = Batch(ids, positions, ids.clone(), None, lines=(1,), lengths=(ids.numel(),))
                loss = sft.loss(model, batch, layout).sums.sum()
        torch.autograd.backward(loss)

    step()  # The gradients are allocated here, so that they count as the adapter's.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    current = most = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        current += change
        most = max(most, current)
    return most


# ---------------------------------------------------------------- changes that make a run fit


@pytest.mark.parametrize(
    ("fields", "device_bytes", "param", "value"),
    [
        ({"micro_batch": 8, "max_length": 2048}, 12 * GIB, "trainer.micro_batch", 4),
        ({"micro_batch": 8, "max_length": 2048}, 9 * GIB, "trainer.micro_batch", 1),
        ({"max_length": 2048, "checkpointing": False}, 12 * GIB, "trainer.gradient_checkpointing", True),
        ({"max_length": 8192}, 11 * GIB, "trainer.max_length", 7296),
        ({"quantization": Quantization.NONE, "max_length": 512}, 12 * GIB, "quantization", Quantization.INT8),
        ({"quantization": Quantization.NONE, "max_length": 512}, 9 * GIB, "quantization", Quantization.NF4),
    ],
)
def test_change_is_the_cheapest_that_fits(fields: dict[str, Any], device_bytes: int, param: str, value: object) -> None:
    setup = setup_of(r=16, **fields)
    assert memory_model.peak_memory(LLAMA_8B, setup).total > device_bytes
    change = memory_model.change(LLAMA_8B, setup, device_bytes)
    assert change is not None
    assert (change.param, change.value) == (param, value)
    assert change.total <= device_bytes


def test_change_is_none_if_no_single_change_is_enough() -> None:
    setup = setup_of(quantization=Quantization.NONE, r=16, micro_batch=8, max_length=4096)
    assert memory_model.change(LLAMA_8B, setup, 10 * GIB) is None
    assert 6 * GIB < memory_model.smallest(LLAMA_8B, setup) < 10 * GIB
    assert memory_model.change(LLAMA_8B, setup_of(r=16), memory_model.smallest(LLAMA_8B, setup_of(r=16)) - 1) is None


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ({"r": 8}, {"r": 64}),
        ({"quantization": Quantization.NF4}, {"quantization": Quantization.INT8}),
        ({"quantization": Quantization.INT8}, {"quantization": Quantization.NONE}),
        ({"micro_batch": 1}, {"micro_batch": 2}),
        ({"max_length": 512}, {"max_length": 1024}),
        ({"checkpointing": True}, {"checkpointing": False}),
        ({"use_dora": False}, {"use_dora": True}),
        ({"dropout": 0.0}, {"dropout": 0.1}),
        ({"target_modules": ["q_proj"]}, {"target_modules": "all-linear"}),
        ({"packing": False, "max_length": 64}, {"packing": True, "max_length": 64}),
    ],
)
def test_larger_settings_need_more_memory(smaller: dict[str, Any], larger: dict[str, Any]) -> None:
    base = {"r": 16, "max_length": 4096}
    less, more = (memory_model.peak_memory(LLAMA_8B, setup_of(**base | fields)) for fields in (smaller, larger))
    assert less.total < more.total
    for memory in (less, more):
        parts = memory.model_dump()
        assert parts.pop("total") == sum(parts.values())


def test_an_unknown_target_module_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"'c_attn' names no .* some of down_proj, gate_proj, k_proj"):
        memory_model.peak_memory(LLAMA_8B, setup_of(target_modules=["q_proj", "c_attn"]))


def test_trainer_and_memory_model_use_the_same_buffer_sizes() -> None:
    assert setup_of(max_length=2).row == defaults.PACK_LENGTH
    profiles = memory_model.DEVICE_PROFILES
    assert {kind: device.chunk_bytes for kind, device in profiles.items()} == defaults.CHUNK_BYTES
    assert vars(log_likelihood)["CHUNK_BYTES"] is defaults.CHUNK_BYTES
    assert profiles["cpu"].resident_bytes == defaults.RESIDENT_BYTES == vars(fused_lora)["RESIDENT_BYTES"]


def test_4_bit_matrices_stay_dequantized_up_to_resident_bytes_on_a_cpu() -> None:
    small, large, gpu = (
        memory_model.peak_memory(base, setup_of(quantization=Quantization.NF4, device=device)).dequantized
        for base, device in ((SMOL, "cpu"), (LLAMA_8B, "cpu"), (LLAMA_8B, "cuda"))
    )
    assert small == 2 * SMOL.linear
    assert gpu == 2 * 4096 * 14_336
    assert large == gpu + defaults.RESIDENT_BYTES
