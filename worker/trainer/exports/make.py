"""Make an export of a verified adapter: write it, load it again as a user would, and compare it with the adapter.

Owns: the order of these steps, and what is measured: the loss on the held-out rows, with the same arithmetic as in
training, and the largest difference of a logit. An export that does not read back is not published. Must not change the
adapter's folder.
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
from worker.trainer.exports.fingerprint import Mismatch, check_tensors, fingerprint
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

#: Rows, and tokens of each, whose logits are compared.
LOGIT_ROWS = 2
LOGIT_TOKENS = 256
#: Held-out rows whose texts the exported tokenizer must encode as the base's does.
TOKENIZER_ROWS = 50
#: More such texts: digits, spaces, line breaks, characters beyond ASCII.
TEXTS = ("12345 3.14", "  two  spaces\n\n\tand lines ", "Ünïcödé 帽子 🎩 don't", " leading")


@dataclass(frozen=True, slots=True)
class Reference:
    """What an export is compared with: the adapter's logits on the documents `tried`.

    `device` and `dtype` are those that the logits were computed with. `check_stop` raises Interrupted if a stop was
    requested.
    """

    command: MakeExport
    encoder: Encoder
    rows: Split
    tried: list[Encoded]
    logits: list[torch.Tensor]
    device: torch.device
    dtype: torch.dtype
    check_stop: Callable[[], None]


def export(command: MakeExport, *, stopping: Callable[[], bool], tick: Callable[[], None]) -> Exported:
    """Make one export in `work_dir`/exports/`name`.

    Raises TrainingFailed (`export_unlike`) if it does not read back as it was written, and Interrupted once `stopping`
    returns True, which is called between steps and before each scored batch.
    """
    if command.task.torch_threads > 0:
        torch.set_num_threads(command.task.torch_threads)
    folder = Path(command.work_dir) / "exports" / command.name
    with disk.atomic_folder(folder) as partial:
        try:
            if command.name is ExportName.GGUF_ADAPTER:
                made = _export_adapter(command, partial)
            else:
                made = _export_model(command, partial, stopping, tick)
        except Mismatch as mismatch:
            raise TrainingFailed(
                f"the export {command.name.value} does not read back as it was written: {mismatch}",
                code="export_unlike",
                hint="the adapter itself is verified and is published; report this error with the job's id",
            ) from mismatch
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Exported(job=command.job, path=str(folder), export=made.model_copy(update={"bytes": size}))


def _export_adapter(command: MakeExport, folder: Path) -> Export:
    """Write the adapter as GGUF. It must read back bit for bit, so nothing is scored."""
    config = AutoConfig.from_pretrained(command.task.base_dir, local_files_only=True)
    tensors = read.tensors(Path(command.adapter_dir))
    path = folder / gguf.ADAPTER
    gguf.write_adapter(path, tensors, config, command.task, command.recipe)
    gguf.check_adapter(path, tensors, config, command.recipe)
    return Export(name=command.name)


def _export_model(command: MakeExport, folder: Path, stopping: Callable[[], bool], tick: Callable[[], None]) -> Export:
    """Merge, write, load again and compare.

    One model is in memory at a time, plus the quantized base while its values are copied.
    """
    task, adapter = command.task, Path(command.adapter_dir)
    base = load_base(task.base_dir, command.recipe.quantization)
    reference, stored = _reference(command, base, stopping, tick), base.stored_dtype
    reference.check_stop()
    size = base.model.num_parameters() * merged.export_dtype(stored).itemsize
    if command.name is ExportName.MERGED_DEQUANTIZED:
        made = merged.dequantized(task, adapter, base, merged.choose_device(base.device, size))
        del base
    else:
        del base
        free_memory.free()
        made = merged.original(task, adapter, stored, merged.choose_device(reference.device, size))
    reference.check_stop()
    config, expected = made.config, fingerprint(made, reference.dtype)
    if command.name is ExportName.GGUF_MERGED:
        gguf.write_model(folder / gguf.MODEL, made, task, reference.encoder)
    else:
        merged.write(folder, made, reference.encoder.tokenizer, task)
    del made
    free_memory.free()
    reference.check_stop()
    reference = replace(reference, device=merged.choose_device(reference.device, size))
    loaded = _read(folder, reference, config)
    check_tensors(loaded, expected)
    return _compare(reference, loaded)


def _read(folder: Path, reference: Reference, config: PretrainedConfig) -> PreTrainedModel:
    if reference.command.name is not ExportName.GGUF_MERGED:
        return merged.read(folder, reference.dtype, reference.device)
    path = folder / gguf.MODEL
    _check_tokenizer(path, reference, config.vocab_size)
    return gguf.read_model(path, config, reference.dtype, reference.device)


def _reference(command: MakeExport, base: Base, stopping: Callable[[], bool], tick: Callable[[], None]) -> Reference:
    """Compute the adapter's logits on the base. The base is unchanged afterwards."""
    task, recipe = command.task, command.recipe

    def check_stop() -> None:
        if stopping():
            raise Interrupted

    encoder = Encoder(task.base_dir)
    rows = split(dataset.load(task, encoder, tick=tick), recipe.max_length, seed=recipe.seed)
    tried = [row.documents[0].cut(LOGIT_TOKENS) for row in rows.heldout[:LOGIT_ROWS]]
    adapted = load_adapter(base.model, Path(command.adapter_dir))
    logits = _logits(base, tried)
    adapted.unload()
    return Reference(command, encoder, rows, tried, logits, base.device, base.compute_dtype, check_stop)


def _compare(reference: Reference, loaded: PreTrainedModel) -> Export:
    """Measure how far the loaded model is from the adapter. Raises Mismatch if its loss is off by too much."""
    command, found = reference.command, Base(loaded, reference.device, reference.dtype)
    pairs = zip(_logits(found, reference.tried), reference.logits, strict=True)
    largest = max(float((ours - expected).abs().max()) for ours, expected in pairs)
    narrow = max(1, command.recipe.micro_batch >> command.fallback_level)
    pad = reference.encoder.eos
    layout, _ = layout_probe.layout(found, reference.rows.train, packing=False, micro_batch=narrow, pad=pad)
    loss = _loss(found, [row.documents[0] for row in reference.rows.heldout], layout, reference.check_stop)
    tuned = command.proof.tuned
    # For preferences, compare the loss on chosen answers: DPO's own loss needs the base, which a merged model lacks.
    own = tuned.loss if tuned.chosen_loss is None else tuned.chosen_loss
    # On other weights than those it was trained against, an adapter has another loss.
    same_weights = command.name is ExportName.MERGED_DEQUANTIZED or command.recipe.quantization is Quantization.NONE
    off = same_weights and abs(loss - own) > command.proof.tolerance * max(1.0, own)
    if off or not math.isfinite(loss + largest):
        raise Mismatch(f"its loss is {loss:.6g}; expected {own:.6g}, and a logit differs by {largest:.3g}")
    return Export(name=command.name, loss=loss, difference=loss - own, max_logit_difference=largest)


def _loss(found: Base, answers: Sequence[Encoded], layout: Layout, check_stop: Callable[[], None]) -> float:
    """Mean loss over the trained tokens, in nats."""
    tally = Tally()
    found.model.eval()
    with torch.no_grad(), found.precision():
        for batch in batches(answers, packing=False, micro_batch=layout.micro_batch, pad=layout.pad):
            check_stop()
            tally.add(sft.loss(found.model, batch.to(found.device), layout))
    return tally.score().loss


def _logits(found: Base, rows: Sequence[Encoded]) -> list[torch.Tensor]:
    """Logits of each row through the model's own forward, in fp32, moved to the CPU to be kept."""
    found.model.eval()
    with torch.no_grad(), found.precision():
        loaded = [collate([[row]], packing=False, pad=0).to(found.device) for row in rows]
        return [own_logits(found.model, batch).float().cpu() for batch in loaded]


def _check_tokenizer(path: Path, reference: Reference, size: int) -> None:
    rows = reference.rows.heldout[:TOKENIZER_ROWS]
    texts = [reference.encoder.text(row.documents[0].ids.tolist()) for row in rows]
    written = vocabulary.of(reference.encoder.tokenizer, size)
    gguf.check_tokenizer(path, written, reference.encoder, [*texts, *TEXTS])
