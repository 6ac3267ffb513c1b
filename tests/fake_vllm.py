"""A stand-in for the part of vLLM 0.33.0 that the adapter uses, strict in what it accepts, over a real transformers model.

An unknown argument is a TypeError and a wrong type or range a ValueError, as in vLLM. What vLLM does not forgive, or forgives in silence
with wrong results, is an error here: speaking while asleep, weights handed to sleeping memory, a prefix cache older than the weights, an
adapter's number used for two states, a second instance that sleeps. Weights that sleep at level 2 are gone.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
TAGS = {"weights", "kv_cache"}


def _is(value: Any, kind: type | tuple[type, ...], name: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {kind}, got {value!r}")


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("n", "top_k", "max_tokens"):
            _is(getattr(self, name), int, name)
        for name in ("temperature", "top_p"):
            _is(getattr(self, name), (int, float), name)
        for name in ("detokenize", "skip_special_tokens"):
            _is(getattr(self, name), bool, name)
        self.stop, self.stop_token_ids = self.stop or [], self.stop_token_ids or []
        _is(self.stop, list, "stop")
        _is(self.stop_token_ids, list, "stop_token_ids")
        if self.seed is not None:
            _is(self.seed, int, "seed")
        if not 0 <= self.temperature <= 2 or 0 < self.temperature < 0.01:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}")
        if not 0 < self.top_p <= 1 or self.top_k < -1 or self.max_tokens < 1 or self.n != 1:
            raise ValueError(f"out of range: {self}")
        if any(not s for s in self.stop) or (self.stop and not self.detokenize):
            raise ValueError("stop strings are only supported when detokenize is True, and cannot be empty")
        if self.logprobs != 0:
            raise ValueError("the stand-in gives the sampled token's log-prob alone")


class LoRARequest:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str = "") -> None:
        _is(lora_name, str, "lora_name")
        _is(lora_int_id, int, "lora_int_id")
        if lora_int_id < 1 or not lora_path:
            raise ValueError("id must be > 0 and lora_path not empty")
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str
    stop_reason: int | str | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """``made`` lists all instances; ``calls`` what each was asked to do, in order."""

    made: list[LLM] = []  # noqa: RUF012

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        enable_sleep_mode: bool = False,
        enforce_eager: bool = False,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
        trust_remote_code: bool = False,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        tensor_parallel_size: int = 1,
        distributed_executor_backend: str | None = None,
    ) -> None:
        for name, value, kind in (
            ("model", model, str),
            ("seed", seed, int),
            ("max_model_len", max_model_len, int),
            ("enable_sleep_mode", enable_sleep_mode, bool),
            ("enforce_eager", enforce_eager, bool),
            ("trust_remote_code", trust_remote_code, bool),
            ("enable_lora", enable_lora, bool),
            ("max_loras", max_loras, int),
            ("tensor_parallel_size", tensor_parallel_size, int),
        ):
            _is(value, kind, name)
        if not 0 < gpu_memory_utilization < 1 or max_lora_rank not in RANKS or dtype not in ("float32", "bfloat16"):
            raise ValueError("gpu_memory_utilization, max_lora_rank or dtype is out of range")
        if logprobs_mode != "processed_logprobs" or generation_config != "vllm":
            raise ValueError("the stand-in knows processed_logprobs and generation_config 'vllm' alone")
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0":
            raise RuntimeError("tensors and iterators cannot be sent to an engine in another process")
        self.place = _place(distributed_executor_backend, tensor_parallel_size)
        if enable_sleep_mode and any(llm.sleeps for llm in LLM.made):
            raise AssertionError("CuMem allocator can only be used for one instance per process.")
        self.core = Core(model, max_model_len, (max_loras, max_lora_rank) if enable_lora else None)
        self.sleeps, self._asleep = enable_sleep_mode, set[str]()
        self.calls: list[str] = []
        LLM.made.append(self)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.sleeps, "sleep mode is not enabled"
        assert mode in ("abort", "keep"), "'wait' pause mode is not supported in inproc-engine mode"
        assert level in (1, 2)
        self.calls.append(f"sleep {level}")
        self._asleep = set(TAGS)
        self.core.cached = self.core.version
        if level == 2:
            self.core.forget()

    def wake_up(self, tags: list[str] | None = None) -> bool:
        wanted = TAGS if tags is None else set(tags)
        if not wanted <= self._asleep:
            raise RuntimeError(f"{wanted} are not asleep")
        self.calls.append(f"wake {'+'.join(sorted(wanted))}")
        self._asleep -= wanted
        return not self._asleep

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset")
        self.core.cached = self.core.version
        return True

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[None]:
        def reload_weights(
            weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
            weights_path: str | None = None,
            is_checkpoint_format: bool = True,
        ) -> None:
            assert weights_iterator is not None and weights_path is None and is_checkpoint_format
            if "weights" in self._asleep:
                raise RuntimeError("an illegal memory access was encountered")  # what the GPU would say
            self.core.load(weights_iterator)

        assert method == "reload_weights", method
        self.calls.append(method)
        reload_weights(*args, **(kwargs or {}))
        return [None]

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert len(prompts), "there is nothing to sample"
        if self._asleep:
            raise RuntimeError(f"the engine is asleep: {self._asleep}")
        if sampling_params is None or len(sampling_params) != len(prompts):
            raise ValueError("The lengths of prompts and params must be the same.")
        self.calls.append(f"generate {len(prompts)}")
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert set(prompt) == {"prompt_token_ids"}
            assert isinstance(params, SamplingParams)
            outputs.append(
                RequestOutput(
                    prompt["prompt_token_ids"], [self.core.sample(prompt["prompt_token_ids"], params, lora_request)]
                )
            )
        return outputs


def _place(backend: str | None, parallel: int) -> tuple[int, int] | None:
    """Its rank and its device's number where others have launched it; all ranks must make theirs together, as vLLM takes the least free
    memory of all of them."""
    assert parallel == 1, "the stand-in does not split a model"
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if backend is None:
        assert ranks == 1, "every rank would take itself for rank 0 of 1 in a group of others"
        return None
    if backend != "external_launcher":
        raise ValueError(f"the stand-in knows no distributed_executor_backend {backend!r}")
    assert os.environ["MASTER_ADDR"] and os.environ["MASTER_PORT"]
    place = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    assert dist.is_initialized() and place[0] == dist.get_rank()
    dist.all_reduce(torch.tensor([place[0]]), op=dist.ReduceOp.MIN)
    return place


class Core:
    """What both the library and the server run: the model, its adapters, its prefix cache's age."""

    def __init__(self, path: str, length: int, lora: tuple[int, int] | None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.length, self.lora = length, lora
        self.version = self.cached = 0
        self.adapters: dict[int, tuple[str, str]] = {}
        self.peft: PeftModel | None = None

    def forget(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        seen = set()
        with torch.no_grad():
            for name, tensor in weights:
                assert own[name].shape == tensor.shape, name
                own[name].copy_(tensor)
                seen.add(name)
        assert seen == set(own), f"not loaded: {set(own) - seen}"
        self.version += 1

    def sample(self, ids: list[int], params: SamplingParams, lora: LoRARequest | None) -> CompletionOutput:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids) or not ids:
            raise ValueError("prompt_token_ids must be a list of ints")
        if len(ids) + params.max_tokens > self.length:
            raise ValueError("the prompt and its completion are longer than max_model_len")
        if lora is None and self.cached != self.version:
            raise AssertionError("the prefix cache is older than the weights: reset_prefix_cache was forgotten")
        model = self._with(lora)
        generator = torch.Generator().manual_seed(params.seed)
        said: list[int] = []
        logprobs: list[dict[int, Logprob]] = []
        text, reason, stopped = "", "length", None
        for _ in range(params.max_tokens):
            with torch.no_grad():
                logits_V = model(torch.tensor([ids + said])).logits[0, -1].float()
            logprob_V = processed(logits_V, params).log_softmax(-1)
            greedy = params.temperature == 0
            token = int(logprob_V.argmax() if greedy else torch.multinomial(logprob_V.exp(), 1, generator=generator))
            said.append(token)
            logprobs.append({token: Logprob(logprob_V[token].item(), 1)})
            if token in params.stop_token_ids or token == self.tokenizer.eos_token_id:
                reason, stopped = "stop", token
                break
            text = (
                self.tokenizer.decode(said, skip_special_tokens=params.skip_special_tokens) if params.detokenize else ""
            )
            found = next((s for s in params.stop if s in text), None)
            if found is not None:
                reason, stopped, text = "stop", found, text[: text.index(found)]
                break
        return CompletionOutput(0, text, said, logprobs, reason, stopped)

    def _with(self, lora: LoRARequest | None) -> Any:
        if lora is None:
            return self.model
        assert self.lora is not None, "enable_lora was not set"
        known = self.adapters.setdefault(lora.lora_int_id, (lora.lora_name, lora.lora_path))
        assert known == (lora.lora_name, lora.lora_path), (
            "vLLM would go on with the adapter that it has under this number"
        )
        name = str(lora.lora_int_id)
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.model, lora.lora_path, adapter_name=name).eval()
        elif name not in self.peft.peft_config:
            self.peft.load_adapter(lora.lora_path, adapter_name=name)
        assert self.peft.peft_config[name].r <= self.lora[1]
        self.peft.set_adapter(name)
        return self.peft


def processed(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The logits after temperature, top-k and top-p."""
    if params.temperature == 0:
        return logits_V
    logits_V = logits_V / params.temperature
    if params.top_k > 0:
        logits_V = torch.where(logits_V < logits_V.topk(params.top_k).values[-1], float("-inf"), logits_V)
    if params.top_p < 1:
        ordered, places = logits_V.softmax(-1).sort(descending=True)
        gone = ordered.cumsum(-1) - ordered >= params.top_p
        logits_V = logits_V.index_fill(0, places[gone], float("-inf"))
    return logits_V


# --- the server, and weight transfer to it


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource:
    def __init_subclass__(cls, **keys: Any) -> None:
        super().__init_subclass__(**keys)
        if not isinstance(cls.__dict__.get("metadata"), cached_property):
            raise TypeError(f"{cls.__name__}.metadata must be a functools.cached_property")


@dataclass
class NCCLTrainerInitInfo:
    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    rank: int = field(kw_only=True)


class HTTPVLLMWeightSyncClient:
    def __init__(self, base_url: str, timeout: float = 300) -> None:
        self.base_url, self.timeout = base_url, timeout

    def post(self, path: str, body: Any = None) -> None:
        from ccpo.engines.http import HttpClient

        data = None if body is None else json.dumps(body).encode()
        assert HttpClient(self.base_url).exchange("POST", f"/{path}", data, timeout=30).status == 200, path


class _Trainer:
    """The data plane is this list, in the place of an NCCL group."""

    wire: list[tuple[str, torch.Tensor]] = []  # noqa: RUF012

    def __init__(self, init_info: NCCLTrainerInitInfo, client: HTTPVLLMWeightSyncClient, source: WeightSource) -> None:
        self.client, self.source, self.sent = client, source, None
        client.post("init_weight_transfer_engine", {"init_info": asdict(init_info)})

    def send_weights(self) -> None:
        meta = self.source.metadata
        self.client.post("start_weight_update")
        _Trainer.wire[:] = [(name, tensor.clone()) for name, tensor in self.source.iter_full()]
        assert [(m.name, m.shape) for m in meta] == [(n, tuple(t.shape)) for n, t in _Trainer.wire]
        self.client.post("update_weights", {"update_info": {"names": [m.name for m in meta]}})
        self.client.post("finish_weight_update")


class WeightTransferTrainerFactory:
    @classmethod
    def trainer_init(
        cls, init_info: NCCLTrainerInitInfo, *, client: HTTPVLLMWeightSyncClient, source: WeightSource
    ) -> _Trainer:
        assert isinstance(init_info, NCCLTrainerInitInfo) and isinstance(source, WeightSource)
        return _Trainer(init_info, client, source)


class _Routes(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._reply({"/health": {}, "/get_world_size": {"world_size": 1}}.get(urlsplit(self.path).path))

    def do_POST(self) -> None:
        world: FakeServer = self.server.world
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else {}
        path = urlsplit(self.path).path
        assert not parse_qs(urlsplit(self.path).query)
        with world.lock:
            if path != "/inference/v1/generate":
                world.calls.append(path)
            try:
                self._reply(world.routes[path](**body) if path in world.routes else None)
            except (TypeError, ValueError, AssertionError, KeyError) as error:
                self._reply({"error": {"message": f"{type(error).__name__}: {error}"}}, status=400)

    def _reply(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data if data is not None else {"detail": "Not Found"}).encode()
        self.send_response(404 if data is None else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class FakeServer:
    """``vllm serve`` as far as the adapter uses it. ``calls`` are the control calls, in order."""

    def __init__(self, path: str, *, length: int = 512, lora: bool = False) -> None:
        self.core = Core(path, length, (8, 512) if lora else None)
        self.lock, self.calls, self.url = threading.Lock(), [], ""
        self.named: dict[str, LoRARequest] = {}
        self.updating = self.linked = False
        self.routes: dict[str, Callable[..., Any]] = {
            "/init_weight_transfer_engine": self._init,
            "/start_weight_update": self._start,
            "/update_weights": self._update,
            "/finish_weight_update": self._finish,
            "/reset_prefix_cache": self._reset,
            "/inference/v1/generate": self._generate,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
        }

    def _init(self, init_info: dict[str, Any]) -> Any:
        assert init_info["world_size"] == 2 and init_info["master_port"] > 0
        self.linked = True
        return {"message": "Weight transfer initialized"}

    def _start(self) -> Any:
        assert self.linked and not self.updating
        self.updating = True
        return {"message": "Weight update started"}

    def _update(self, update_info: dict[str, Any]) -> Any:
        assert self.updating and update_info["names"] == [name for name, _ in _Trainer.wire]
        self.core.load(_Trainer.wire)
        return {"message": "Weights updated"}

    def _finish(self, weight_version: str | None = None) -> Any:
        assert self.updating
        self.updating = False
        return {"message": "Weight update finished"}

    def _reset(self) -> Any:
        self.core.cached = self.core.version
        return {"success": True}

    def _load(self, lora_name: str, lora_path: str, load_inplace: bool = False) -> Any:
        assert lora_name not in self.named
        self.named[lora_name] = LoRARequest(lora_name, len(self.core.adapters) + 1, lora_path)
        return {}

    def _unload(self, lora_name: str) -> Any:
        del self.named[lora_name]
        return {}

    def _generate(
        self, token_ids: list[int], sampling_params: dict[str, Any], stream: bool, model: str | None = None
    ) -> Any:
        assert not stream and not self.updating
        lora = self.named[model] if model is not None else None
        said = self.core.sample(token_ids, SamplingParams(**sampling_params), lora)
        content = [
            {"token_id": t, "logprob": p[t].logprob, "top_logprobs": []}
            for t, p in zip(said.token_ids, said.logprobs, strict=True)
        ]
        choice = {
            "index": 0,
            "token_ids": said.token_ids,
            "logprobs": {"content": content},
            "finish_reason": said.finish_reason,
        }
        return {"request_id": "x", "choices": [choice]}


@contextmanager
def serving_vllm(path: str, **keys: Any) -> Iterator[FakeServer]:
    world = FakeServer(path, **keys)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Routes)
    server.daemon_threads = True
    server.world = world  # type: ignore[attr-defined]
    world.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield world
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def install(monkeypatch: Any) -> None:
    """Put the stand-in where ``import vllm`` finds it, and let the adapter run on a CPU."""
    LLM.made.clear()
    contents = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {
            "HTTPVLLMWeightSyncClient": HTTPVLLMWeightSyncClient,
            "ParamMeta": ParamMeta,
            "WeightSource": WeightSource,
            "WeightTransferTrainerFactory": WeightTransferTrainerFactory,
        },
        "vllm.distributed.weight_transfer.nccl_engine": {"NCCLTrainerInitInfo": NCCLTrainerInitInfo},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("ccpo.engines.vllm.DEVICES", ("cuda", "cpu"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "x")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # the adapter sets it, and the test's end takes it away
