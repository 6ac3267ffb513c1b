"""vLLM as an engine: what both ways of running it share, and vLLM within this process (colocated with the learner).

Written against vLLM 0.33.0 and its documentation of that version (LLM, SamplingParams, sleep mode, LoRA adapters, weight transfer).

One instance serves all policies of one architecture: a policy's weights are handed over in place, on the device, when it is to speak
and another one's are there (``reload_weights`` by ``collective_rpc``); so K agents need one more copy of the weights and one cache, not K.
LoRA adapters sit beside one another, each version of each under a name and number of its own, since vLLM keeps its adapters and cached
prefixes by them. While the learner works the instance sleeps: level 2 (weights and cache are dropped) where weights are handed over
anyway, level 1 (weights wait in main memory) under adapters.

Every request is sampled on its own (n = 1) with its own seed, so that a sample hangs on its seed and not on its place among n; a prompt
that requests share is computed once, by vLLM's prefix cache. vLLM's noise is not this library's: the same seed gives another text than
the native engine, and the same text in vLLM up to rounding. Prompts go in and texts come back as token ids; where a text ends is
found again here.

Of several ranks each has an instance of its own, on its own GPU, which samples the rank's share. vLLM must then be told that the processes
were started by others (``distributed_executor_backend="external_launcher"``), since it finds a torch.distributed group that is theirs; it
reads its place in it from ``LAUNCHED_BY``, and takes the least free memory of all ranks, so that all must make their instances together.

``logprobs_mode="processed_logprobs"``: log-probs are at the request's temperature, as this library wants them, but *after* top-p and
top-k have cut; a recipe that trains with a cut is therefore refused (:mod:`ccpo.build`). vLLM takes temperatures of 0 and of 0.01 to 2.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ccpo.engines.base import check_requests
from ccpo.engines.finish import complete_row, decoder, end_ids
from ccpo.errors import RunFailure, UserError
from ccpo.families import bare
from ccpo.types import Completion, FinishReason, Request

WRITTEN_AGAINST = "0.33.0"
DEVICES = ("cuda",)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
COOLEST, HOTTEST = 0.01, 2.0
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
LAUNCHED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun and Ray Train set
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """``memory``: share of the device's memory; ``length``: most tokens of a prompt with its completion; ``dtype``: a name of torch's;
    ``adapters`` and ``rank``: the LoRA adapters of a base, 0 where there are none; ``processes``: how many have an instance each."""

    memory: float = 0.45
    sleep: bool = True
    eager: bool = False
    length: int = 4096
    dtype: str = "bfloat16"
    adapters: int = 0
    rank: int = 0
    processes: int = 1
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request as vLLM has it: ``params`` are arguments of its SamplingParams."""

    prompt_ids: tuple[int, ...]
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    token_ids: list[int]
    logprobs: list[float]
    finish: str | None


class Host(Protocol):
    """One vLLM instance. ``hold`` makes it speak with an engine's present weights; ``rest`` frees what the learner needs."""

    length: int

    def hold(self, engine: VllmEngine) -> None: ...

    def sample(self, jobs: Sequence[Job], engine: VllmEngine) -> list[Sampled]: ...

    def rest(self) -> None: ...

    def close(self) -> None: ...


def check_installed(device: str) -> None:
    """Raises UserError where vLLM is not there, or cannot run on ``device``."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "model.engine is 'vllm', which is not installed; install it beside ccpo on a machine with CUDA (pip install 'ccpo[vllm]'), or "
            "set model.engine: auto"
        )
    if device not in DEVICES:
        raise UserError(
            f"model.engine is 'vllm', which runs on a GPU, and this run is on {device}; set model.engine: auto, or run on a machine with "
            "CUDA (run.device: auto)"
        )


def check_launched(devices: int) -> None:
    """Raises UserError where vLLM could not find this process's place among several, or its GPU among the ``devices`` that it sees."""
    missing = [name for name in LAUNCHED_BY if name not in os.environ]
    if missing:
        raise UserError(
            f"model.engine is 'vllm' in several processes, and the environment lacks {', '.join(missing)}, by which vLLM finds its place; start "
            "them with --launch or torchrun"
        )
    place = int(os.environ["LOCAL_RANK"])
    if place >= devices:
        raise UserError(
            f"model.engine is 'vllm', which needs a GPU for each process, and process {place} of this machine (LOCAL_RANK) sees {devices}; start "
            "fewer, and let all of them see all GPUs"
        )


class VllmEngine:
    """Speaks for one policy through a host; see `ccpo.engines.base.Engine`. ``stale``: the host has not had the policy's present
    weights."""

    def __init__(self, host: Host, model: Any, tokenizer: Any, adapter: str | None = None) -> None:
        self.host, self.model, self.adapter = host, model, adapter
        self.stale = True
        self.prefill_tokens = self.decoded_tokens = 0
        config = bare(model).config.get_text_config()
        self.positions = min(host.length, getattr(config, "max_position_embeddings", host.length))
        self._vocab = config.vocab_size
        self._ends = end_ids(bare(model), tokenizer)
        self._decode = decoder(tokenizer)

    def refresh(self) -> None:
        """The policy's weights have changed: they are handed over when it speaks next."""
        self.stale = True

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order. Raises UserError for a request that vLLM cannot decode, RunFailure where what it gives
        back cannot be."""
        if not requests:
            return []
        check_requests(requests, vocab=self._vocab, positions=self.positions)
        for number, request in enumerate(requests):
            if request.temperature and not COOLEST <= request.temperature <= HOTTEST:
                raise UserError(
                    f"request {number} has temperature {request.temperature}; vLLM takes 0 (greedy) and {COOLEST} to {HOTTEST:g}"
                )
        self.host.hold(self)
        jobs = [Job(prompt_ids=r.prompt_ids, params=sampling(r, self._ends)) for r in requests]
        sampled = self.host.sample(jobs, self)
        done = [self._completion(r, s) for r, s in zip(requests, sampled, strict=True)]
        self.prefill_tokens += sum(len(r.prompt_ids) for r in requests)
        self.decoded_tokens += sum(len(c.token_ids) for c in done)
        return done

    def _completion(self, request: Request, sampled: Sampled) -> Completion:
        if sampled.finish not in ("stop", "length"):
            raise RunFailure(
                f"vLLM ended a completion with {sampled.finish!r}, neither a stop nor its length; look at its log"
            )
        if len(sampled.token_ids) != len(sampled.logprobs) or not all(-9000 < x <= 1e-3 for x in sampled.logprobs):
            raise RunFailure(
                "vLLM gave log-probs that are none of the tokens' (not finite, or not one a token); its weights may be broken"
            )
        done = complete_row(request, sampled.token_ids, sampled.logprobs, self._ends, self._decode)
        if done.finish is FinishReason.LENGTH and (
            sampled.finish == "stop" or len(done.token_ids) < request.max_tokens
        ):
            raise RunFailure(
                f"vLLM ended a completion after {len(sampled.token_ids)} of {request.max_tokens} tokens without an end token or stop string "
                "that this side can see; are its model's tokenizer and this policy's the same?"
            )
        return done


def sampling(request: Request, ends: Sequence[int]) -> dict[str, Any]:
    """The arguments of SamplingParams for a request."""
    return {
        "n": 1,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed % 2**63,
        "stop": list(request.stop),
        "stop_token_ids": list(ends),
        "max_tokens": request.max_tokens,
        "logprobs": 0,  # of the sampled token alone
        "detokenize": bool(request.stop),
        "skip_special_tokens": True,
    }


class ColocatedHost:
    """vLLM within this process, on the learner's device."""

    def __init__(self, model: Any, settings: VllmSettings) -> None:
        os.environ.setdefault(IN_PROCESS, "0")
        if os.environ[IN_PROCESS] != "0":
            raise UserError(
                f"{IN_PROCESS} is {os.environ[IN_PROCESS]!r}, so vLLM would run in another process and could not be handed weights; unset it"
            )
        from vllm import LLM

        self.settings, self.length = settings, settings.length
        self._holder: VllmEngine | None = None
        self._adapters = Adapters(settings)
        self._asleep = False
        lora = (
            {"enable_lora": True, "max_loras": settings.adapters, "max_lora_rank": kernel_rank(settings.rank)}
            if settings.adapters
            else {}
        )
        ranks = (
            {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 1}
            if settings.processes > 1
            else {}
        )
        self.llm = LLM(
            model=source_of(model),
            dtype=settings.dtype,
            seed=0,
            gpu_memory_utilization=settings.memory,
            max_model_len=settings.length,
            enable_sleep_mode=settings.sleep,
            enforce_eager=settings.eager,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            trust_remote_code=settings.trust_remote_code,
            **lora,
            **ranks,
        )

    def hold(self, engine: VllmEngine) -> None:
        if self._asleep:
            self.llm.wake_up(tags=["weights"])
        loads = engine.adapter is None and (engine is not self._holder or engine.stale)
        if loads:
            self._holder = None
            weights = [(name, p.detach()) for name, p in bare(engine.model).named_parameters()]
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            self._holder = engine
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if loads and not self.llm.reset_prefix_cache():
            raise RunFailure(
                "vLLM could not clear its prefix cache after new weights; some request of it has not ended"
            )
        if engine.adapter is not None:
            self._adapters.hold(engine)
        engine.stale = False

    def sample(self, jobs: Sequence[Job], engine: VllmEngine) -> list[Sampled]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": list(job.prompt_ids)} for job in jobs],
            sampling_params=[SamplingParams(**job.params) for job in jobs],
            use_tqdm=False,
            lora_request=self._lora(engine),
        )
        return [_sampled(output.outputs[0]) for output in outputs]

    def rest(self) -> None:
        """Give the device's memory to the learner."""
        if self.settings.sleep and not self._asleep:
            if not self.settings.adapters:
                self._holder = None  # its weights are dropped
            self.llm.sleep(level=1 if self.settings.adapters else 2)
            self._asleep = True

    def close(self) -> None:
        """Let go of the instance and its share of the device's memory."""
        self._adapters.close()
        self.llm = self._holder = None

    def _lora(self, engine: VllmEngine) -> Any:
        if engine.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        version = self._adapters.current[engine.adapter]
        return LoRARequest(lora_name=version.name, lora_int_id=version.number, lora_path=version.path)


@dataclass(frozen=True, slots=True)
class Version:
    """One state of an adapter on disk. No two have the same name or number."""

    name: str
    number: int
    path: str


class Adapters:
    """The present version of each adapter, in a temporary folder. An earlier one is deleted."""

    def __init__(self, settings: VllmSettings) -> None:
        self.current: dict[str, Version] = {}
        self._place = tempfile.TemporaryDirectory(prefix="ccpo-lora-") if settings.adapters else None
        self._count = 0

    def hold(self, engine: VllmEngine) -> tuple[Version, Version | None]:
        """Write the engine's adapter anew where it is stale; its version, and the one before it."""
        before = self.current.get(engine.adapter)
        if not engine.stale and before is not None:
            return before, before
        self._count += 1
        folder = Path(self._place.name) / str(self._count)
        engine.model.save_pretrained(str(folder), selected_adapters=[engine.adapter])
        (config,) = folder.rglob("adapter_config.json")
        fresh = Version(name=f"{engine.adapter}#{self._count}", number=self._count, path=str(config.parent))
        self.current[engine.adapter] = fresh
        if before is not None:
            shutil.rmtree(Path(self._place.name) / str(before.number), ignore_errors=True)
        return fresh, before

    def close(self) -> None:
        if self._place is not None:
            self._place.cleanup()


class Hosts:
    """The vLLM instances of a run: one for each architecture with its vocabulary, or each base of adapters."""

    def __init__(self, settings: VllmSettings, make: Any = ColocatedHost) -> None:
        self.settings, self._make = settings, make
        self._hosts: dict[str, Host] = {}

    def engine(self, model: Any, tokenizer: Any, adapter: str | None) -> VllmEngine:
        """An engine for a policy. Raises UserError where it would need a second instance and the first one is to sleep, which vLLM's allocator
        allows to one of a process."""
        key = self._key(model, tokenizer, adapter)
        if key not in self._hosts:
            if self._hosts and self.settings.sleep and self._make is ColocatedHost:
                raise UserError(
                    "the agents' models have different shapes or tokenizers, so they need a vLLM instance each, and only one of a process can "
                    "sleep; set model.vllm.sleep: false and a smaller model.vllm.memory, or give the agents models of one shape"
                )
            self._hosts[key] = self._make(model, self.settings)
        return VllmEngine(self._hosts[key], model, tokenizer, adapter)

    def rest(self) -> None:
        for host in self._hosts.values():
            host.rest()

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()

    def _key(self, model: Any, tokenizer: Any, adapter: str | None) -> str:
        if adapter is not None:
            return f"base {id(bare(model))}"
        shape = {
            k: v
            for k, v in bare(model).config.to_dict().items()
            if not k.startswith("_") and k not in ("dtype", "transformers_version")
        }
        return json.dumps([shape, sorted(tokenizer.get_vocab().items())], sort_keys=True, default=str)


def source_of(model: Any) -> str:
    """The folder or name that a model was loaded from. Raises UserError where it has none."""
    path = bare(model).name_or_path or getattr(bare(model).config, "_name_or_path", "")
    if not path:
        raise UserError(
            "the vllm engine needs a model from a folder or the hub, to read its configuration; save it there first"
        )
    return path


def kernel_rank(rank: int) -> int:
    """The smallest rank that vLLM has a kernel for and that holds ``rank``. Raises UserError for one that is too large."""
    fits = [r for r in RANKS if r >= rank]
    if not fits:
        raise UserError(
            f"model.lora.rank is {rank}, and vLLM serves adapters up to rank {RANKS[-1]}; lower it, or set model.engine: auto"
        )
    return fits[0]


def _sampled(output: Any) -> Sampled:
    ids = list(output.token_ids)
    return Sampled(
        token_ids=ids,
        logprobs=[place[token].logprob for place, token in zip(output.logprobs, ids, strict=True)],
        finish=output.finish_reason,
    )
