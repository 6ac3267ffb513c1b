"""The trainers of other libraries, one step a call: TRL's GRPOTrainer and CoMLRL's MAGRPOTrainer. Both are optional."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import torch

from ccpo.bench.ours import parity
from ccpo.tasks.procedural import DigitSum

PEERS = {"trl": "trl==1.16.0", "comlrl": "comlrl==1.4.3"}


def missing(package: str) -> str | None:
    """How to install a peer that is not there; None where it is."""
    return None if importlib.util.find_spec(package) else f"pip install {PEERS[package]}"


def problems(count: int, digits: int = 7) -> list[str]:
    task = DigitSum(digits=(digits, digits))
    return [task[i].text for i in range(count)]


class TrlStep:
    """GRPOTrainer in a thread of its own that pauses after each step, as it has no step to call. Bfloat16, without recomputed
    activations. On a CPU by autocast and with eager attention, as SDPA's bfloat16 backward pass is slow there; on a GPU with the weights
    in bfloat16 too, which autocast would convert again at every token."""

    def __init__(
        self, base: Path, folder: Path, *, prompts: int, samples: int, tokens: int, steps: int, device: str
    ) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        self.lengths: list[int] = []
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._threads = torch.get_num_threads()
        outer = self

        class Pause(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                outer._go.acquire()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                outer._done.release()

        def reward(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            self.lengths = [len(ids) for ids in completion_ids]
            return [parity(text) for text in completions]

        cpu = device == "cpu"
        self._trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                base,
                attn_implementation="eager" if cpu else "sdpa",
                dtype=torch.float32 if cpu else torch.bfloat16,
            ),
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=str(folder),
                per_device_train_batch_size=prompts * samples,
                num_generations=samples,
                max_completion_length=tokens,
                max_steps=steps,
                learning_rate=1e-6,
                beta=0.0,
                bf16=True,
                gradient_checkpointing=False,
                use_cpu=cpu,
                report_to=[],
                save_strategy="no",
                logging_steps=10**9,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"T{text}:"} for text in problems(prompts * (steps + 2))]),
            processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
            callbacks=[Pause()],
        )
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            self._trainer.train()
        except BaseException as error:  # handed to the caller, who waits for the step
            self._error = error
            self._done.release()

    def __call__(self) -> None:
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class ComlrlStep:
    """MAGRPOTrainer with two agents of one turn, which both see the problem and are paid together. It generates problem by problem and
    updates when its buffer holds a batch; it has no mixed precision, so that it works in float32."""

    def __init__(self, base: Path, *, prompts: int, samples: int, tokens: int, device: str) -> None:
        from comlrl.trainers.reinforce.magrpo import MAGRPOConfig, MAGRPOTrainer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._problems, self._next, self._prompts = problems(4_096), 0, prompts
        self.tokens = 0
        outer = self

        class Counting(MAGRPOTrainer):
            def _generate_completions(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                found = super()._generate_completions(*args, **kwargs)
                outer.tokens += sum(found["response_lens"])
                return found

        def reward(first: list[str], second: list[str], **kwargs: Any) -> list[float]:
            return [(parity(a) + parity(b)) / 2 for a, b in zip(first, second, strict=True)]

        self._trainer = Counting(
            agents=[AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) for _ in range(2)],
            num_agents=2,
            tokenizer=AutoTokenizer.from_pretrained(base, padding_side="left"),
            reward_func=reward,
            formatters=[lambda item: f"T{item['prompt']}:", lambda item: f"S{item['prompt']}:"],
            args=MAGRPOConfig(
                num_train_epochs=1,
                agent_learning_rate=1e-6,
                num_agents=2,
                agent_devices=device,
                num_generations=samples,
                max_new_tokens=tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                num_turns=1,
                eval_interval=0,
                rollout_buffer_size=prompts,
                logging_steps=10**9,
            ),
            train_dataset=None,
        )
        for agent in self._trainer.agents:
            agent.train()

    def __call__(self) -> None:
        self.tokens = 0
        for _ in range(self._prompts):
            self._trainer._train_step_returns({"prompt": self._problems[self._next % len(self._problems)]})
            self._next += 1
