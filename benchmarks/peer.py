"""Train our rows with TRL's SFTTrainer, as its documentation advises: `.venv-bench/bin/python -m benchmarks.peer JSON`.

Owns: the best configuration of the peer. The recipe is the one that our trainer resolved; this module chooses what TRL
leaves to its user: bf16 autocast, an adapter in fp32, and no gradient checkpointing (TRL's default is on, which
computes every forward twice to save memory that this base does not need). Rows are packed by best fit, and attention
keeps them apart by their positions. Prints one JSON line: seconds in optimizer steps, and the monotonic time at the end
of the first step.
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
    """Measures the seconds in optimizer steps."""

    def __init__(self) -> None:
        self.begun, self.seconds, self.first = 0.0, 0.0, 0.0

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self.begun = time.monotonic()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        now = time.monotonic()
        self.seconds += now - self.begun
        self.first = self.first or now


def main(options: dict[str, Any]) -> None:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(options["base"])
    model = AutoModelForCausalLM.from_pretrained(options["base"], quantization_config=nf4, dtype=torch.bfloat16)
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=options["rows"], split="train"),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=options["r"],
            lora_alpha=options["alpha"],
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=options["out"],
            num_train_epochs=1,
            per_device_train_batch_size=options["batch"],
            gradient_accumulation_steps=options["accumulation"],
            learning_rate=options["learning_rate"],
            lr_scheduler_type=options["schedule"],
            warmup_steps=options["warmup_steps"],
            weight_decay=0.0,
            max_grad_norm=options["max_grad_norm"],
            seed=options["seed"],
            max_length=options["max_length"],
            packing=options["packing"],
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
    trainer.model.save_pretrained(options["out"])
    done = {"seconds": clock.seconds, "first_step_at": clock.first, "steps": trainer.state.global_step}
    print(json.dumps(done | {"trl": trl.__version__}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
