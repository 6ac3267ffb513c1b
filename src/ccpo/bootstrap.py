"""A tiny base model of our own, for machines without a download: the stand-in for a pretrained checkpoint in the CPU recipes.

It is a Qwen2 of about a million parameters with a character tokenizer, trained on a task's demonstrations of every
turn of the team: first on right ones (the skill), then on ones of which a share is wrong (the carelessness that
reinforcement learning is to cure). The result is an ordinary Hugging Face folder; nothing after this file knows where
it came from. It is cached by the hash of all that shaped it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ccpo.cachefolder import cache_folder
from ccpo.config import CONTEXT, BootstrapSection
from ccpo.errors import UserError
from ccpo.learner.loading import quiet
from ccpo.rating_lessons import RatingLessons
from ccpo.tasks.procedural import ProceduralTask
from ccpo.teams import Team

VERSION = 5  # raise it when the same section would make another model
PAD, EOS = "<pad>", "<eos>"

Pair = tuple[list[int], list[int], bool]
"""Token ids of a prompt and of what is to be said after it (with the end token); and whether the prompt says all that is needed."""


def bootstrap(
    team: Team,
    task: ProceduralTask,
    section: BootstrapSection,
    report: Callable[[str], None] = lambda _: None,
    *,
    ratings: RatingLessons | None = None,
    check: Callable[[torch.nn.Module], None] | None = None,
) -> tuple[Path, float]:
    """The folder of the base model for ``team`` on ``task``, and the seconds spent on making it (0.0 where it was cached). With
    ``ratings`` it learns to rate, too. ``check`` sees the model before it has learnt anything, and raises where it will not do.

    Raises UserError where the task has no teacher.
    """
    if not isinstance(task, ProceduralTask):
        raise UserError(
            "model.path is 'bootstrap', which teaches a tiny model from a procedural task's demonstrations, but the task has none; "
            "set model.path to a Hugging Face model (for example --set model.path=Qwen/Qwen2.5-0.5B-Instruct)"
        )
    if not isinstance(team, Team):
        raise UserError(
            f"model.path is 'bootstrap', but team {team.name!r} is a Python function, whose turns nobody can demonstrate; "
            "set model.path to a Hugging Face model"
        )
    folder = cache_folder() / f"base-{_fingerprint(team, task, section, ratings)}"
    if section.cache and (folder / "done.json").is_file():
        return folder, 0.0
    if check is not None:
        check(fresh_model(section, base_tokenizer(team, task, ratings)))
    started = time.monotonic()
    model, tokenizer = train_base(team, task, section, report, ratings)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    with quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    seconds = time.monotonic() - started
    (temporary / "done.json").write_text(
        json.dumps({"seconds": seconds, "section": section.model_dump(), "task": repr(task)})
    )
    if section.cache and (folder / "done.json").is_file():
        shutil.rmtree(temporary)  # another run has made the same model meanwhile and may be reading it
        return folder, seconds
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder, seconds


def _fingerprint(
    team: Team, task: ProceduralTask, section: BootstrapSection, ratings: RatingLessons | None = None
) -> str:
    turns = [(t.name, t.template) for t in team.turns]
    said = section.model_dump(exclude={"cache", "ratings", "rating_noise"})
    what = [VERSION, turns, _characters(team, task, ratings), repr(task), said]
    if ratings is not None:
        what += ratings.shaped_by()
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _characters(team: Team, task: ProceduralTask, ratings: RatingLessons | None = None) -> str:
    """Every character that the base model can read and write."""
    texts = [task.alphabet, *(t.template for t in team.turns), *(ratings.texts() if ratings else ())]
    return "".join(sorted(set("".join(texts))))


def base_tokenizer(team: Team, task: ProceduralTask, ratings: RatingLessons | None = None):
    """The tokenizer that the base model for ``team`` on ``task`` gets."""
    return character_tokenizer(_characters(team, task, ratings))


def character_tokenizer(alphabet: str):
    """A tokenizer with one token a character of ``alphabet`` (ASCII), and a padding and an end token.

    It is a byte-level BPE without merges, because ``AutoTokenizer`` gives a Qwen2 folder the Qwen2 pre-tokenizer whatever the
    folder says: any other kind would come back as another tokenizer (a word-level one without its spaces).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = sorted(set(alphabet))
    if not all(c.isascii() for c in characters):
        raise UserError(
            f"the base model's characters must be ASCII; found {''.join(c for c in characters if not c.isascii())!r}"
        )
    vocabulary = {
        token: i for i, token in enumerate([PAD, EOS, *(split.pre_tokenize_str(c)[0][0] for c in characters)])
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS)


def fresh_model(section: BootstrapSection, tokenizer):
    """The base model before it has learnt anything."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=section.hidden,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.kv_heads,
        intermediate_size=section.mlp,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(section.seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def train_base(
    team: Team,
    task: ProceduralTask,
    section: BootstrapSection,
    report: Callable[[str], None],
    ratings: RatingLessons | None = None,
):
    """Train the base model; returns it with its tokenizer."""
    tokenizer = base_tokenizer(team, task, ratings)
    model = fresh_model(section, tokenizer)
    lessons = Lessons(team, task, section, tokenizer, ratings)
    _learn_skill(model, lessons, section, report)
    _learn_carelessness(model, lessons, section, report)
    return model, tokenizer


def _learn_skill(model, lessons: Lessons, section: BootstrapSection, report: Callable[[str], None]) -> None:
    """Right demonstrations at a constant rate until what can be known is known, then ``cooldown`` steps of falling rate.

    How long a model sits on its plateau before it learns depends on rounding (on the number of threads, even), so that no fixed
    number of steps would do: ``steps`` is only the most.
    """
    optimiser = _optimiser(model, section.lr)
    smoothed, fall = 10.0, None
    for step in range(section.steps):
        left = 1.0 if fall is None else 1.0 - 0.9 * (step - fall) / section.cooldown
        loss, known = _imitate(model, lessons.batch(section.batch, noisy=False))
        _update(model, optimiser, loss, section.lr * min(left, (step + 1) / 50))
        smoothed = 0.9 * smoothed + 0.1 * known
        if fall is None and (smoothed < section.learned or step + section.cooldown >= section.steps):
            fall = step
        if fall is not None and step - fall >= section.cooldown:
            break
        if (step + 1) % 50 == 0:
            report(f"base model, skill: step {step + 1}, loss {known:.3f}, to fall below {section.learned:g}")
    report(f"base model, skill: learned in {step + 1} steps, loss {known:.3f}")


def _learn_carelessness(model, lessons: Lessons, section: BootstrapSection, report: Callable[[str], None]) -> None:
    """Demonstrations of which a share is wrong, ``noisy_steps`` of them: warm-up, plateau, and a fall over the last three tenths."""
    optimiser = _optimiser(model, section.noisy_lr)
    total = section.noisy_steps
    for step in range(total):
        loss, _ = _imitate(model, lessons.batch(section.batch, noisy=True))
        _update(
            model,
            optimiser,
            loss,
            section.noisy_lr * min(1.0, (step + 1) / 50, 0.1 + 0.9 * (total - step) / (0.3 * total)),
        )
    report(f"base model, carelessness: {total} steps")


def _optimiser(model, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def _update(model, optimiser: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


class Lessons:
    """Demonstrations of every turn of the team, rendered through the team's own templates, and, where they are wanted, one rating for every
    four of them. Those of the turns are the same with ratings and without."""

    def __init__(
        self,
        team: Team,
        task: ProceduralTask,
        section: BootstrapSection,
        tokenizer,
        ratings: RatingLessons | None = None,
    ) -> None:
        self.team, self.task, self.section, self.tokenizer = team, task, section, tokenizer
        self.rng = random.Random(f"lessons/{section.seed}")
        self.ratings = ratings
        self.rating_rng = random.Random(f"ratings/{section.seed}")
        self.count = 0

    def batch(self, size: int, *, noisy: bool) -> list[Pair]:
        pairs: list[Pair] = []
        while len(pairs) < size:
            pairs += self.lesson(noisy=noisy)
        return [*pairs[:size], *(self.rating() for _ in range(-(-size // 4) if self.ratings else 0))]

    def lesson(self, *, noisy: bool) -> list[Pair]:
        """One problem played by the teacher: a pair for each turn."""
        problem = self.task[self.count % len(self.task)]
        self.count += 1
        said: dict[str, str] = {}
        pairs = []
        for turn in self.team.turns_in_order:
            alone = self.rng.random() < self.section.solo
            heard = {name: None if alone else said[name] for name in turn.reads}
            said[turn.name] = self.task.teach(
                problem, turn.name, heard, self.rng, self._noise(turn.name) if noisy else 0.0
            )
            prompt = turn.render({"problem": problem.text, **heard})
            known = not (alone and turn.reads)
            pairs.append(self._pair(prompt, said[turn.name], known=known))
        return pairs

    def rating(self) -> Pair:
        """A careless play and a rating of it, while the skill is learned, too. How well it rates is no measure of the skill."""
        rng = self.rating_rng
        problem, said = self.task[rng.randrange(len(self.task))], dict[str, str]()
        for turn in self.team.turns_in_order:
            heard = {name: said[name] for name in turn.reads}
            said[turn.name] = self.task.teach(problem, turn.name, heard, rng, self._noise(turn.name))
        prompt, words = self.ratings.lesson(problem, said, rng)
        return self._pair(prompt, words, known=False)

    def _pair(self, prompt: str, said: str, *, known: bool) -> Pair:
        return self._ids(prompt), [*self._ids(said), self.tokenizer.eos_token_id], known

    def _noise(self, turn: str) -> float:
        noise = self.section.noise
        return noise if isinstance(noise, float) else noise.get(turn, 0.0)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != len(text):  # an unknown character is dropped in silence, and would never be learned
            raise UserError(
                f"task {self.task.name!r} says {text!r}, which its alphabet {self.task.alphabet!r} cannot write"
            )
        return ids


def _imitate(model, pairs: Sequence[Pair]) -> tuple[Tensor, float]:
    """Cross-entropy of what was to be said: the mean over rows of the mean over a row's tokens; and that of the rows whose
    prompt says all that is needed, which can go to 0."""
    length = max(len(p) + len(t) for p, t, _ in pairs)
    ids_BL = torch.zeros(len(pairs), length, dtype=torch.long)
    labels_BL = torch.full((len(pairs), length), -100)
    for row, (prompt, target, _) in enumerate(pairs):
        ids_BL[row, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        labels_BL[row, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BLV = model(input_ids=ids_BL).logits
    target_BL = labels_BL[:, 1:]
    loss_BL = torch.nn.functional.cross_entropy(
        logits_BLV[:, :-1].float().flatten(0, 1), target_BL.flatten(), ignore_index=-100, reduction="none"
    ).view_as(target_BL)
    # rows weigh the same: a solver's single digit must not drown in a thinker's twenty tokens
    loss_B = loss_BL.sum(1) / (target_BL >= 0).sum(1)
    known_B = torch.tensor([known for _, _, known in pairs])
    return loss_B.mean(), loss_B.detach()[known_B].mean().item()
