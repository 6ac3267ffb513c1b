"""A full training step against TRL's ``GRPOTrainer`` at its best CPU setting: same model, prompts, rollouts, tokens and reward.

Shapes of the demo: 64 rollouts of 32 tokens, a Qwen2 of about a million parameters, one agent that is paid by shared
reward. TRL runs in bfloat16 with eager attention, its fastest setting on a CPU (``--trl-dtype float32`` for the
other). The two trainers live in one process and take turns, step by step, so that a noisy machine slows both alike.
Needs ``pip install trl==1.16.0``.

    python benchmarks/step_vs_trl.py --steps 15 --threads 2 --out benchmarks/step_vs_trl.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

PROBLEMS, SAMPLES, TOKENS = 8, 8, 32


def make_base(folder: Path) -> None:
    """A random model that never ends a turn early, so that both sides decode every token, and a character tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from ccpo.bootstrap import character_tokenizer

    tokenizer = character_tokenizer("0123456789+ TS:=abcdefghijklmnopqrstuvwxyz")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # the first channel is large at every position, and only the end token reads it, negatively: it is never sampled
        model.model.embed_tokens.weight[:, 0] = 4.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -5.0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Ours:
    def __init__(self, base: Path, work: Path, steps: int) -> None:
        from ccpo.build import prepare
        from ccpo.config import load_recipe
        from ccpo.crew import Crew
        from ccpo.loggers import Sinks
        from ccpo.runfolder import RunFolder
        from ccpo.trainer import Trainer

        config = load_recipe(
            {
                "run": {"name": "bench", "dir": str(work / "ours")},
                "team": {"kind": "voting", "k": 1, "prompts": {"voter1": "T{problem}:"}},
                "task": {"kind": "digit_sum", "digits": [7, 7]},
                "model": {"path": str(base)},
                "credit": {"kind": "shared"},
                "rollout": {
                    "prompts": PROBLEMS,
                    "samples": SAMPLES,
                    "max_tokens": TOKENS,
                    "max_prompt_tokens": 64,
                    "truncated": "keep",
                },
                "optim": {"lr": 1e-6},
                "trainer": {"steps": steps},
            }
        )
        folder = RunFolder(config.run.folder)
        folder.create(overwrite=False)
        setup = prepare(config)
        # every row must have a gradient, as a random model never earns a reward: pay by the parity of the text
        object.__setattr__(setup, "task", ParityTask(setup.task))
        self.trainer = Trainer(setup, Crew(setup, {"voter1": str(base)}), folder, Sinks({}))
        self.tokens = 0

    def step(self) -> float:
        started = time.perf_counter()
        metrics = self.trainer.train_step()
        self.tokens = int(metrics["tokens/joint"])
        return time.perf_counter() - started


class ParityTask:
    """The problems of another task, paid by whether the text has an even number of sevens: a reward with spread for a random model."""

    def __init__(self, inner) -> None:
        self.inner, self.name = inner, "parity"

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int):
        return self.inner[index]

    def verify(self, pairs):
        from ccpo.types import Verdict

        return [Verdict(score=parity(text), answer=text) for _, text in pairs]


def parity(text: str) -> float:
    return float(text.count("7") % 2 == 0)


class Theirs:
    """TRL in a thread of its own that pauses after each step: its trainer has no step() to call."""

    def __init__(self, base: Path, work: Path, steps: int, dtype: str) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        from ccpo.tasks.procedural import DigitSum

        task = DigitSum(digits=(7, 7))
        data = Dataset.from_list([{"prompt": f"T{task[i].text}:"} for i in range(PROBLEMS * (steps + 2))])
        config = GRPOConfig(
            output_dir=str(work / "trl"),
            per_device_train_batch_size=PROBLEMS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=TOKENS,
            max_steps=steps,
            learning_rate=1e-6,
            beta=0.0,
            bf16=dtype == "bfloat16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=10**9,
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        outer = self

        class Pause(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                outer.go.acquire()

            def on_step_end(self, *args, **kwargs):
                outer.done.release()

        self.lengths: list[int] = []

        def reward(completions, completion_ids, **kwargs):
            self.lengths = [len(ids) for ids in completion_ids]
            return [parity(text) for text in completions]

        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
            callbacks=[Pause()],
        )
        self.error: BaseException | None = None

        def run() -> None:
            torch.set_num_threads(THREADS)
            try:
                trainer.train()
            except BaseException as error:  # handed to the caller, who waits
                self.error = error
                self.done.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def step(self) -> float:
        started = time.perf_counter()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return time.perf_counter() - started

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def main() -> None:
    global THREADS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    THREADS = args.threads
    torch.set_num_threads(THREADS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_base(work / "base")
        warm = 3
        ours, theirs = (
            Ours(work / "base", work, args.steps + warm),
            Theirs(work / "base", work, args.steps + warm, args.trl_dtype),
        )
        times: dict[str, list[float]] = {"ccpo": [], "trl": []}
        for i in range(args.steps + warm):
            pair = {"ccpo": ours.step(), "trl": theirs.step()}
            if i >= warm:
                for side, seconds in pair.items():
                    times[side].append(seconds)
        ratios = sorted(t / o for o, t in zip(times["ccpo"], times["trl"], strict=True))
        report = {
            "rollouts": PROBLEMS * SAMPLES,
            "tokens_decoded": {"ccpo": ours.tokens, "trl": theirs.tokens},
            "threads": THREADS,
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "trl_dtype": args.trl_dtype,
            "seconds_median": {k: statistics.median(v) for k, v in times.items()},
            "seconds_min_max": {k: [min(v), max(v)] for k, v in times.items()},
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        }
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


THREADS = 2

if __name__ == "__main__":
    main()
