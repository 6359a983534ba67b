"""Use the stock `openai` client with your own server. Must not import Milliner.

milliner up --detach
export OPENAI_BASE_URL=… OPENAI_API_KEY=…        # as `milliner up` prints them
python examples/openai_client.py
"""

from __future__ import annotations

import json
import sys
import time

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

MODEL = "SmolLM2-135M-Instruct"
ENDED = ("succeeded", "failed", "cancelled")
CAPITALS = {"France": "Paris", "Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo", "Norway": "Oslo", "Cuba": "Havana"}


def main() -> None:
    client = OpenAI()

    rows = [
        {"messages": [{"role": "user", "content": f"Capital of {country}?"}, {"role": "assistant", "content": city}]}
        for country, city in CAPITALS.items()
    ]
    data = "\n".join(json.dumps(row) for row in rows).encode()
    file = client.files.create(file=("capitals.jsonl", data), purpose="fine-tune")
    file = client.files.wait_for_processing(file.id)
    print(f"uploaded   {file.id}, {file.bytes} bytes, {file.status}")

    job = create(client, file.id, epochs=2, suffix="capitals")
    other = create(client, file.id, epochs=50, suffix="not-wanted")
    print(f"created    {job.id} and {other.id}")
    print(f"cancelled  {client.fine_tuning.jobs.cancel(other.id).id}")

    job, other = wait(client, job), wait(client, other)
    print(f"ended      {job.status} and {other.status}")
    if job.status != "succeeded":
        sys.exit(f"{job.error}")

    # Small pages on purpose: the client requests the next page by itself, until the server reports the last one.
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    for event in reversed(events):
        print(f"event      {event.message}")
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=3):
        print(f"checkpoint {checkpoint.fine_tuned_model_checkpoint}, step {checkpoint.step_number}")

    print(f"model      {job.fine_tuned_model}, {job.trained_tokens} tokens trained")
    for file_id in job.result_files:
        print(client.files.content(file_id).text.strip())


def create(client: OpenAI, file_id: str, *, epochs: int, suffix: str) -> FineTuningJob:
    return client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file_id,
        suffix=suffix,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs, "batch_size": 2}}},
        extra_body={"lora": {"r": 8}, "trainer": {"save_every": 2}},
    )


def wait(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    while job.status not in ENDED:
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


if __name__ == "__main__":
    main()
