"""One more form of a proven adapter: written, loaded again as its user would, and held against the adapter.

Owns: the order of that, and what is measured: the loss on the held-out rows by the same arithmetic as in training, and
the largest difference of a logit. An export that does not read back is none. Must leave the adapter's folder alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shared.errors import TrainingFailed
from shared.protocol import Exported, MakeExport
from shared.schemas import ExportName
from shared.training import Export
from worker.trainer import checkpoint, data, ladder, model, published, selftest
from worker.trainer.batches import batches, collate
from worker.trainer.encoding import Encoded, Encoder, Row
from worker.trainer.evaluate import Interrupted
from worker.trainer.exports import gguf_files, merged, vocabulary
from worker.trainer.likelihood import Layout, own_logits
from worker.trainer.methods import Tally, sft
from worker.trainer.model import Base
from worker.trainer.prepare import Rows, usable

TRIED_ROWS = 2
TRIED_TOKENS = 256
READ_TEXTS = 50
#: Further texts that a tokenizer must read alike: digits, spaces, lines, letters beyond ASCII.
TEXTS = ("12345 3.14", "  two  spaces\n\n\tand lines ", "Ünïcödé 帽子 🎩 don't", " leading")

Check = Callable[[], None]


def export(command: MakeExport, *, stopping: Callable[[], bool], tick: Check) -> Exported:
    """Raises TrainingFailed where what was written does not read back, and Interrupted once `stopping` says so."""
    task = command.task
    if task.torch_threads > 0:
        torch.set_num_threads(task.torch_threads)

    def go_on() -> None:
        if stopping():
            raise Interrupted

    folder = Path(command.work_dir) / "exports" / command.name
    with checkpoint.whole(folder) as partial:
        try:
            if command.name is ExportName.GGUF_ADAPTER:
                made = _adapter(command, partial)
            else:
                made = _model(command, partial, go_on, tick)
        except gguf_files.Unlike as unlike:
            raise _unlike(command.name, str(unlike)) from unlike
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Exported(job=command.job, path=str(folder), export=made.model_copy(update={"bytes": size}))


def _adapter(command: MakeExport, folder: Path) -> Export:
    """Read back to the bit, so that there is nothing to score."""
    config = AutoConfig.from_pretrained(command.task.base_dir, local_files_only=True)
    tensors = published.tensors(Path(command.adapter_dir))
    gguf_files.write_adapter(folder / gguf_files.ADAPTER, tensors, config, command.task, command.recipe)
    gguf_files.check_adapter(folder / gguf_files.ADAPTER, tensors, config)
    return Export(name=command.name)


def _model(command: MakeExport, folder: Path, go_on: Check, tick: Check) -> Export:
    task, adapter = command.task, Path(command.adapter_dir)
    encoder = Encoder(task.base_dir)
    rows = usable(data.load(task, encoder, tick=tick), command.recipe.max_length, seed=command.recipe.seed)
    tried = [row.documents[0].cut(TRIED_TOKENS) for row in rows.heldout[:TRIED_ROWS]]
    base = model.load_base(task.base_dir, command.recipe.quantization)
    go_on()
    adapted = model.load_adapter(base.model, adapter)
    wanted = _logits(base, tried)
    adapted.unload()
    device, dtype = base.device, base.compute_dtype
    if command.name is ExportName.MERGED_DEQUANTIZED:
        made = merged.dequantized(task, adapter, base)
    del base, adapted
    ladder.free()
    if command.name is not ExportName.MERGED_DEQUANTIZED:
        made = merged.original(task, adapter, device)
    go_on()
    if command.name is ExportName.GGUF_MERGED:
        gguf_files.write_model(folder / gguf_files.MODEL, made, task, encoder)
        config, kept = made.config, gguf_files.fingerprint(made)
        del made
        ladder.free()
        go_on()
        again = gguf_files.read_model(folder / gguf_files.MODEL, config, dtype, device)
        gguf_files.check_tensors(again, kept)
        _check_tokenizer(folder / gguf_files.MODEL, encoder, rows, config.vocab_size)
    else:
        merged.write(folder, made, encoder.tokenizer, task)
        del made
        ladder.free()
        go_on()
        again = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, local_files_only=True, trust_remote_code=False
        )
    return _measured(command, Base(again, device, dtype), rows, tried, wanted, encoder, go_on)


def _measured(
    command: MakeExport,
    found: Base,
    rows: Rows,
    tried: Sequence[Encoded],
    wanted: list[torch.Tensor],
    encoder: Encoder,
    go_on: Check,
) -> Export:
    """How far the export is from the adapter that was proven."""
    largest = max(float((a - b).abs().max()) for a, b in zip(_logits(found, tried), wanted, strict=True))
    layout, _ = selftest.layout(
        found,
        rows.train,
        packing=False,
        micro_batch=max(1, command.recipe.micro_batch >> command.memory_halvings),
        pad=encoder.eos,
    )
    loss = _loss(found, [row.documents[0] for row in rows.heldout], layout, go_on)
    if not math.isfinite(loss) or not math.isfinite(largest):
        raise _unlike(command.name, f"its loss is {loss}, its largest difference of a logit {largest}")
    # Of preferences, the chosen answers': against what the gains would be, a merged model no longer holds.
    own = command.proof.tuned.loss if command.proof.tuned.chosen_loss is None else command.proof.tuned.chosen_loss
    return Export(name=command.name, loss=loss, difference=loss - own, max_logit_difference=largest)


def _loss(found: Base, answers: Sequence[Encoded], layout: Layout, go_on: Check) -> float:
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


def _check_tokenizer(path: Path, encoder: Encoder, rows: Rows, size: int) -> None:
    texts = [encoder.text(row.documents[0].ids.tolist()) for row in rows.heldout[:READ_TEXTS]]
    words = vocabulary.of(encoder.tokenizer, size)
    gguf_files.check_tokenizer(path, words, encoder, [*texts, *TEXTS])


def _unlike(name: ExportName, found: str) -> TrainingFailed:
    return TrainingFailed(
        f"the export {name.value} does not read back as it was made: {found}",
        code="export_unlike",
        hint="the adapter itself is proven and published; report this with the job's id",
    )
