"""One more form of a proven adapter: written, loaded again as its user would, and held against the adapter.

Owns: the order of that, and what is measured: the loss on the held-out rows by the same arithmetic as in training, and
the largest difference of a logit. An export that does not read back is none. Must leave the adapter's folder alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from shared import disk
from shared.errors import TrainingFailed
from shared.schemas.requests import ExportName, Quantization
from shared.schemas.results import Export
from worker.trainer.artifact import read
from worker.trainer.data import dataset
from worker.trainer.data.dataset import Split, split
from worker.trainer.data.encoding import Encoded, Encoder
from worker.trainer.exports import gguf, merged
from worker.trainer.exports.fingerprint import Unlike, check_tensors, fingerprint
from worker.trainer.forward import layout_probe
from worker.trainer.forward.batches import batches, collate
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.forward.log_likelihood import own_logits
from worker.trainer.llama_cpp import vocabulary
from worker.trainer.methods import Tally, sft
from worker.trainer.model.base import Base, load_adapter, load_base
from worker.trainer.protocol import Exported, MakeExport
from worker.trainer.system import free_memory

TRIED_ROWS = 2
TRIED_TOKENS = 256
READ_TEXTS = 50
#: Further texts that a tokenizer must read alike: digits, spaces, lines, letters beyond ASCII.
TEXTS = ("12345 3.14", "  two  spaces\n\n\tand lines ", "Ünïcödé 帽子 🎩 don't", " leading")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an export must come up to: the adapter's logits on `tried`, and where and in what type they were computed.

    `go_on` raises Interrupted once a stop is asked for.
    """

    command: MakeExport
    encoder: Encoder
    rows: Split
    tried: list[Encoded]
    logits: list[torch.Tensor]
    device: torch.device
    dtype: torch.dtype
    go_on: Callable[[], None]


def export(command: MakeExport, *, stopping: Callable[[], bool], tick: Callable[[], None]) -> Exported:
    """Raises TrainingFailed where what was written does not read back, and Interrupted once `stopping` says so."""
    if command.task.torch_threads > 0:
        torch.set_num_threads(command.task.torch_threads)
    folder = Path(command.work_dir) / "exports" / command.name
    with disk.atomic_folder(folder) as partial:
        try:
            if command.name is ExportName.GGUF_ADAPTER:
                made = _adapter(command, partial)
            else:
                made = _model(command, partial, stopping, tick)
        except Unlike as unlike:
            raise TrainingFailed(
                f"the export {command.name.value} does not read back as it was made: {unlike}",
                code="export_unlike",
                hint="the adapter itself is proven and published; report this with the job's id",
            ) from unlike
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Exported(job=command.job, path=str(folder), export=made.model_copy(update={"bytes": size}))


def _adapter(command: MakeExport, folder: Path) -> Export:
    """Read back to the bit, so that there is nothing to score."""
    config = AutoConfig.from_pretrained(command.task.base_dir, local_files_only=True)
    tensors = read.tensors(Path(command.adapter_dir))
    path = folder / gguf.ADAPTER
    gguf.write_adapter(path, tensors, config, command.task, command.recipe)
    gguf.check_adapter(path, tensors, config, command.recipe)
    return Export(name=command.name)


def _model(command: MakeExport, folder: Path, stopping: Callable[[], bool], tick: Callable[[], None]) -> Export:
    """One model is held at a time, beside the quantized base while its values are taken over."""
    task, adapter = command.task, Path(command.adapter_dir)
    base = load_base(task.base_dir, command.recipe.quantization)
    wanted, stored = _wanted(command, base, stopping, tick), base.stored_dtype
    wanted.go_on()
    size = base.model.num_parameters() * merged.kept_type(stored).itemsize
    if command.name is ExportName.MERGED_DEQUANTIZED:
        made = merged.dequantized(task, adapter, base, merged.place(base.device, size))
        del base
    else:
        del base
        free_memory.free()
        made = merged.original(task, adapter, stored, merged.place(wanted.device, size))
    wanted.go_on()
    config, kept = made.config, fingerprint(made, wanted.dtype)
    if command.name is ExportName.GGUF_MERGED:
        gguf.write_model(folder / gguf.MODEL, made, task, wanted.encoder)
    else:
        merged.write(folder, made, wanted.encoder.tokenizer, task)
    del made
    free_memory.free()
    wanted.go_on()
    wanted = replace(wanted, device=merged.place(wanted.device, size))
    again = _read(folder, wanted, config)
    check_tensors(again, kept)
    return _measured(wanted, again)


def _read(folder: Path, wanted: Wanted, config: PretrainedConfig) -> PreTrainedModel:
    if wanted.command.name is not ExportName.GGUF_MERGED:
        return merged.read(folder, wanted.dtype, wanted.device)
    path = folder / gguf.MODEL
    _check_tokenizer(path, wanted, config.vocab_size)
    return gguf.read_model(path, config, wanted.dtype, wanted.device)


def _wanted(command: MakeExport, base: Base, stopping: Callable[[], bool], tick: Callable[[], None]) -> Wanted:
    """Leaves the base as it came."""
    task, recipe = command.task, command.recipe

    def go_on() -> None:
        if stopping():
            raise Interrupted

    encoder = Encoder(task.base_dir)
    rows = split(dataset.load(task, encoder, tick=tick), recipe.max_length, seed=recipe.seed)
    tried = [row.documents[0].cut(TRIED_TOKENS) for row in rows.heldout[:TRIED_ROWS]]
    adapted = load_adapter(base.model, Path(command.adapter_dir))
    logits = _logits(base, tried)
    adapted.unload()
    return Wanted(command, encoder, rows, tried, logits, base.device, base.compute_dtype, go_on)


def _measured(wanted: Wanted, again: PreTrainedModel) -> Export:
    """How far what was loaded again is from the adapter that was proven."""
    command, found = wanted.command, Base(again, wanted.device, wanted.dtype)
    pairs = zip(_logits(found, wanted.tried), wanted.logits, strict=True)
    largest = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    narrow = max(1, command.recipe.micro_batch >> command.fallback_level)
    layout, _ = layout_probe.layout(found, wanted.rows.train, packing=False, micro_batch=narrow, pad=wanted.encoder.eos)
    loss = _loss(found, [row.documents[0] for row in wanted.rows.heldout], layout, wanted.go_on)
    tuned = command.proof.tuned
    # Of preferences, the chosen answers': a merged model has no base left that it could gain on.
    own = tuned.loss if tuned.chosen_loss is None else tuned.chosen_loss
    # On other weights than it was trained against, an adapter has a score of its own.
    same = command.name is ExportName.MERGED_DEQUANTIZED or command.recipe.quantization is Quantization.NONE
    off = same and abs(loss - own) > command.proof.tolerance * max(1.0, own)
    if off or not math.isfinite(loss + largest):
        raise Unlike(f"its loss is {loss:.6g}, the adapter's {own:.6g}; a logit is off by {largest:.3g}")
    return Export(name=command.name, loss=loss, difference=loss - own, max_logit_difference=largest)


def _loss(found: Base, answers: Sequence[Encoded], layout: Layout, go_on: Callable[[], None]) -> float:
    """Mean over the trained tokens, in nats."""
    tally = Tally()
    found.model.eval()
    with torch.no_grad(), found.precision():
        for batch in batches(answers, packing=False, micro_batch=layout.micro_batch, pad=layout.pad):
            go_on()
            tally.add(sft.loss(found.model, batch.to(found.device), layout))
    return tally.score().loss


def _logits(found: Base, rows: Sequence[Encoded]) -> list[torch.Tensor]:
    """Row by row, through the model's own forward; on the CPU, to wait there for another's."""
    found.model.eval()
    with torch.no_grad(), found.precision():
        loaded = [collate([[row]], packing=False, pad=0).to(found.device) for row in rows]
        return [own_logits(found.model, batch).float().cpu() for batch in loaded]


def _check_tokenizer(path: Path, wanted: Wanted, size: int) -> None:
    rows = wanted.rows.heldout[:READ_TEXTS]
    texts = [wanted.encoder.text(row.documents[0].ids.tolist()) for row in rows]
    words = vocabulary.of(wanted.encoder.tokenizer, size)
    gguf.check_tokenizer(path, words, wanted.encoder, [*texts, *TEXTS])
