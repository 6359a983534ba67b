"""TRL's SFTTrainer on our rows, as its documentation advises: `.venv-bench/bin/python -m benchmarks.peer JSON`.

Owns: the peer at its best. What it is told is the recipe that ours resolved; what is chosen here is what TRL leaves to
its user. bf16 autocast, an adapter in fp32, and no gradient checkpointing (its default is on, which computes every
forward twice to save memory that this base does not need). Rows are packed best fit, and kept apart in attention by
their positions. Prints one JSON line: seconds spent in optimizer steps, the monotonic time when the first was done.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import trl
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Seconds from the begin of each optimizer step to its end."""

    def __init__(self) -> None:
        self.begun, self.seconds, self.first = 0.0, 0.0, 0.0

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self.begun = time.monotonic()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        now = time.monotonic()
        self.seconds += now - self.begun
        self.first = self.first or now


def main(told: dict[str, Any]) -> None:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(told["base"])
    model = AutoModelForCausalLM.from_pretrained(told["base"], quantization_config=nf4, dtype=torch.bfloat16)
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=told["rows"], split="train"),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=told["r"],
            lora_alpha=told["alpha"],
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=told["out"],
            num_train_epochs=1,
            per_device_train_batch_size=told["batch"],
            gradient_accumulation_steps=told["accumulation"],
            learning_rate=told["learning_rate"],
            lr_scheduler_type=told["schedule"],
            warmup_steps=told["warmup_steps"],
            weight_decay=0.0,
            max_grad_norm=told["max_grad_norm"],
            seed=told["seed"],
            max_length=told["max_length"],
            packing=told["packing"],
            packing_strategy="bfd",
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    trainer.model.save_pretrained(told["out"])
    done = {"seconds": clock.seconds, "first_step_at": clock.first, "steps": trainer.state.global_step}
    print(json.dumps(done | {"trl": trl.__version__}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
