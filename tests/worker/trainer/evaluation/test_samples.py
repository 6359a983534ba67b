"""Prompts end where the answer begins, greedy decoding equals transformers', and the model is left unchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig

from shared.schemas.requests import Quantization
from tests.worker.trainer.conftest import MakeTask, Rows, WriteRows, adapter_bytes, quotes, recipe_of, run
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Encoded, Encoder, Row
from worker.trainer.evaluation import evaluate, samples
from worker.trainer.forward.batches import batches
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import sft
from worker.trainer.model.base import Base, attach, load_base, trainable
from worker.trainer.protocol import Done, Notice, Stopped

LAYOUT = Layout(packing=True, chunked=True, micro_batch=4, pad=2)
NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "NEW_TOKENS", NEW_TOKENS)


@pytest.fixture
def encode(make_task: MakeTask, write_rows: WriteRows, encoder: Encoder) -> Any:
    def encode(rows: Rows) -> list[Row]:
        return dataset.load(make_task(write_rows(rows)), encoder).train

    return encode


def with_adapter(folder: str, recipe: Any, quantization: Quantization = Quantization.NONE) -> tuple[Base, PeftModel]:
    """A base in fp32, so that results can be compared exactly, with an adapter that has an effect."""
    base = load_base(folder, quantization, compute_dtype=torch.float32)
    torch.manual_seed(3)
    adapted = attach(base, recipe).adapted
    for name, parameter in trainable(adapted).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return base, adapted


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 ="),
        (
            {
                "messages": [
                    {"role": "user", "content": "hat?"},
                    {"role": "assistant", "content": "yes"},
                    {"role": "user", "content": "felt?"},
                    {"role": "assistant", "content": "no"},
                    {"role": "user", "content": "thanks"},
                ]
            },
            "user\nhat?\nassistant\nyes\nuser\nfelt?\nassistant\n",
        ),
        ({"text": "abcdefghijkl"}, "abc"),
        ({"prompt": "", "completion": "abcdefghijkl"}, "abc"),
    ],
)
def test_prompt_is_what_comes_before_the_last_answer(
    encode: Any, encoder: Encoder, row: dict[str, Any], prompt: str
) -> None:
    (encoded,) = encode([row])
    cut = samples.prompt_length(encoded, bos=len(encoder.bos))
    assert encoder.tokenizer.decode(encoded.ids[:cut].tolist(), skip_special_tokens=True) == prompt
    assert encoded.trained[cut]


def test_the_prompt_of_a_text_includes_the_bos_token() -> None:
    row = Encoded(1, np.arange(9, dtype=np.int32), np.array([False] + [True] * 8))
    assert samples.prompt_length(row, bos=1) == 3
    assert samples.prompt_length(row, bos=0) == 1


def test_chosen_rows_are_spread_over_the_file_and_have_different_short_prompts(encode: Any, encoder: Encoder) -> None:
    rows = [{"prompt": f"{i // 2}{'long' * 40 * (i == 0)} =", "completion": " x"} for i in range(24)]
    chosen = samples.choose(encode(rows), encoder, longest=20)
    assert [one.row.line for one in chosen] == [2, 7, 13, 19]
    assert samples.choose(encode([{"text": "a"}]), encoder, longest=20) == []


@pytest.mark.parametrize("folder", ["llama", "gpt2"])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_greedy_decoding_equals_that_of_transformers(
    request: pytest.FixtureRequest,
    make_task: MakeTask,
    write_rows: WriteRows,
    encoder: Encoder,
    folder: str,
    chunked: bool,
    adapter: bool,
) -> None:
    """Prompts of different lengths in one batch give what stock `generate` gives for each alone."""
    base, adapted = with_adapter(request.getfixturevalue(folder), recipe_of(make_task(write_rows(quotes(3)))))
    prompts = [encoder.tokenizer(text).input_ids for text in ("hat", 'Quote by N3: "hat hat', "the milliner is felt")]
    layout = Layout(packing=True, chunked=chunked, micro_batch=1, pad=2)
    found = samples.continue_greedily(base, adapted, prompts, encoder.stops, adapter=adapter, layout=layout)
    adapted.eval()
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[2], pad_token_id=2)
    for prompt, ids in zip(prompts, found, strict=True):
        with torch.no_grad(), evaluate.forward_only(base, adapted, adapter=adapter):
            wanted = base.model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config
            )
        assert ids == wanted[0, len(prompt) :].tolist()


def test_stop_token_ends_a_sample_and_is_not_shown(
    llama: str, encode: Any, make_task: MakeTask, write_rows: WriteRows, encoder: Encoder
) -> None:
    """The third token that the base generates is made a stop token."""
    base, adapted = with_adapter(llama, recipe_of(make_task(write_rows(quotes(3)))))
    rows = encode(quotes(1))
    (free,) = samples.compare(base, adapted, rows, encoder, layout=LAYOUT)
    assert (free.base.ended, free.line) == (False, 1)
    prompt = rows[0].ids[: samples.prompt_length(rows[0], bos=0)].tolist()
    (ids,) = samples.continue_greedily(base, adapted, [prompt], encoder.stops, adapter=False, layout=LAYOUT)
    stopping = copy.copy(encoder)
    stopping.stops = frozenset({ids[2]})
    first = ids.index(ids[2])
    (ended,) = samples.compare(base, adapted, rows, stopping, layout=LAYOUT)
    assert ended.base.ended
    assert ended.base.text == encoder.tokenizer.decode(ids[:first], skip_special_tokens=True)


@pytest.mark.parametrize("folder", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("packing", [True, False])
def test_gradients_after_samples_equal_those_before(
    request: pytest.FixtureRequest,
    make_task: MakeTask,
    write_rows: WriteRows,
    encode: Any,
    encoder: Encoder,
    folder: str,
    quantization: Quantization,
    packing: bool,
) -> None:
    """No weight is repacked, nothing cached, no random number drawn, and no mode changed. Samples are deterministic."""
    base, adapted = with_adapter(
        request.getfixturevalue(folder), recipe_of(make_task(write_rows(quotes(8)))), quantization
    )
    rows = encode([{"prompt": f"{'hat ' * i}{i} +", "completion": " felt"} for i in range(8)])
    layout = Layout(packing=packing, chunked=True, micro_batch=4, pad=2)

    def gradients() -> list[torch.Tensor]:
        adapted.zero_grad()
        for batch in batches(rows, packing=True, micro_batch=4, pad=2):
            torch.autograd.backward(sft.loss(base.model, batch, LAYOUT).sums.sum())
        return [p.grad.clone() for p in trainable(adapted).values() if p.grad is not None]

    before, random_before = gradients(), torch.get_rng_state()
    config, generation = base.model.config.to_dict(), base.model.generation_config.to_dict()
    found = samples.compare(base, adapted, rows, encoder, layout=layout)
    assert samples.compare(base, adapted, rows, encoder, layout=layout) == found
    assert len(found) == samples.ROWS
    assert [sample.base for sample in found] != [sample.tuned for sample in found]
    assert adapted.training
    assert torch.equal(torch.get_rng_state(), random_before)
    assert (base.model.config.to_dict(), base.model.generation_config.to_dict()) == (config, generation)
    after = gradients()
    assert any(g.abs().max() > 0 for g in before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_nul_is_replaced_and_long_texts_are_shortened(
    llama: str, make_task: MakeTask, write_rows: WriteRows, encode: Any, encoder: Encoder
) -> None:
    base, adapted = with_adapter(llama, recipe_of(make_task(write_rows(quotes(3)))))
    long = "hat on the head " * 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "SHOWN_CHARACTERS", 20)
        (sample,) = samples.compare(
            base, adapted, encode([{"prompt": f"\0{long}", "completion": f"\0{long}"}]), encoder, layout=LAYOUT
        )
    assert sample.prompt == "…" + long[-20:]
    assert sample.reference == "\N{REPLACEMENT CHARACTER}" + long[:19] + "…"


def test_a_stop_ends_generation_between_two_tokens(
    llama: str, make_task: MakeTask, write_rows: WriteRows, encode: Any, encoder: Encoder
) -> None:
    base, adapted = with_adapter(llama, recipe_of(make_task(write_rows(quotes(3)))))
    asked = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        samples.compare(base, adapted, encode(quotes(4)), encoder, layout=LAYOUT, stopping=lambda: next(asked))
    assert next(asked, None) is None
    assert adapted.training


def test_run_stopped_during_its_samples_resumes_to_the_same_adapter_and_report(
    make_task: MakeTask, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(write_rows(quotes(24)), trainer={"max_steps": 3, "save_every": 1})
    whole = run(task, tmp_path / "whole").of(Done)[0].report

    def interrupted(*args: Any, **options: Any) -> NoReturn:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(samples, "compare", interrupted)
        assert run(task, tmp_path / "first").of(Stopped) == [Stopped(job="j", step=3)]
    saved = tmp_path / "first" / "checkpoints" / "step-00000003"
    report = run(task, tmp_path / "second", resume_from=str(saved)).of(Done)[0].report
    assert (report.tuned, report.change, report.samples) == (whole.tuned, whole.change, whole.samples)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("error", "reason"), [(MemoryError(), "out of memory"), (TypeError("no cache here"), "TypeError: no cache here")]
)
def test_failing_samples_do_not_fail_the_job(
    make_task: MakeTask,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
) -> None:
    def fail(*args: Any, **options: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(samples, "_last_logits", fail)
    observer = run(make_task(write_rows(quotes(4)), trainer={"max_steps": 1}), tmp_path)
    assert observer.of(Done)[0].report.samples == []
    (warning,) = [notice.message for notice in observer.of(Notice) if notice.level == "warn"]
    assert warning.startswith(f"no samples in the report: {reason}")


def test_tuned_model_generates_the_reference(make_task: MakeTask, write_rows: WriteRows, tmp_path: Path) -> None:
    task = make_task(
        write_rows([{"prompt": "the hat", "completion": " is felt"}]), hyperparameters={"n_epochs": 50, "batch_size": 1}
    )
    (sample,) = run(task, tmp_path, learning_rate=1e-2).of(Done)[0].report.samples
    assert (sample.prompt, sample.reference) == ("the hat", " is felt")
    assert (sample.tuned.text, sample.tuned.ended) == (" is felt", True)
    assert sample.base.text != sample.reference
