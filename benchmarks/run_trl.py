"""TRL's DPO trainer, some steps at a time. Runs where TRL is, and imports nothing of ours.

Reads its settings from the first line of stdin, a JSON object. For every further line it takes
`steps` optimizer steps, the rows in the order given, and writes to stdout what they took.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]
from trl import __version__ as trl_version  # pyright: ignore[reportMissingImports]


class CountingTrainer(DPOTrainer):
    """Counts tokens, and sums up losses."""

    tokens, loss = 0, 0.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.tokens += int(inputs["attention_mask"].sum())
        self.loss += float(loss.detach())
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Give the learning rates of our loop, so that losses can be compared: DeepSpeed's schedule
        without a warm-up, which is two steps of none, one of half and then the whole."""
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: min(max(step - 1, 0) / 2, 1.0))
        return self.lr_scheduler


class Rounds(TrainerCallback):
    """Trains when it is told to, until nobody is there to tell."""

    def __init__(self, answers: Any, steps: int) -> None:
        self._answers, self._steps = answers, steps
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._answer({"trl": trl_version})
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._steps:
            return
        self._answer(
            {
                "seconds": time.perf_counter() - self._started,
                "cpu_seconds": time.process_time() - self._cpu_started,
                "num_tokens": self.trainer.tokens,
                "loss": self.trainer.loss / self._steps,
            }
        )
        self._wait(control)

    def _answer(self, found: dict[str, Any]) -> None:
        self._answers.write(json.dumps(found) + "\n")
        self._answers.flush()

    def _wait(self, control: Any) -> None:
        control.should_training_stop |= not sys.stdin.readline()
        self.trainer.tokens, self.trainer.loss = 0, 0.0
        self._started, self._cpu_started = time.perf_counter(), time.process_time()


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    asked = json.loads(sys.stdin.readline())
    torch.set_num_threads(asked["threads"])
    config = DPOConfig(
        output_dir=asked["output"],
        per_device_train_batch_size=asked["pairs"],
        max_steps=asked["total_steps"],
        learning_rate=asked["learning_rate"],
        beta=asked["beta"],
        precompute_ref_log_probs=asked["precompute"],
        train_sampling_strategy="sequential",
        max_length=None,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=False,  # its default, which computes every forward pass twice
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    rounds = Rounds(answers, asked["steps"])
    rounds.trainer = CountingTrainer(
        model=asked["model"],
        args=config,
        train_dataset=Dataset.from_list(asked["rows"]),
        processing_class=AutoTokenizer.from_pretrained(asked["model"]),
        callbacks=[rounds],
    )
    rounds.trainer.train()


if __name__ == "__main__":
    main()
