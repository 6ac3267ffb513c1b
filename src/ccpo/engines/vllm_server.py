"""vLLM as a server on devices of its own: token ids over HTTP, weights over NCCL, adapters through a folder that both sides see.

Written against vLLM 0.33.0: ``POST /inference/v1/generate`` (token ids in, token ids out), its weight transfer for full models
(``WeightTransferTrainerFactory`` with the NCCL backend, whose control calls go over HTTP), ``/v1/load_lora_adapter`` for adapters. The
server must have been started for it; :data:`COMMAND` is how.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from ccpo.engines.fan_out import Stopped, fan_out
from ccpo.engines.http import HttpClient, Trouble, quoted
from ccpo.engines.vllm import Adapters, Job, Sampled, VllmEngine, VllmSettings
from ccpo.errors import EndpointFailure, UserError
from ccpo.families import bare

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    '--generation-config vllm --weight-transfer-config \'{"backend": "nccl"}\''
)
PROBE_SECONDS, CONTROL_SECONDS = 8.0, 300.0


class ServerHost:
    """One server. It speaks with one policy's weights at a time; adapters it holds side by side."""

    def __init__(
        self,
        model: Any,
        settings: VllmSettings,
        *,
        url: str,
        port: int = 51216,
        concurrency: int = 256,
        timeout: float = 600.0,
        address: str | None = None,
    ) -> None:
        self.settings, self.length, self.url = settings, settings.length, url.rstrip("/")
        self._port, self._workers, self._timeout = port, concurrency, timeout
        self._address = address or _own_address(self.url)
        self._client = HttpClient(self.url)
        self._adapters = Adapters(settings)
        self._holder: VllmEngine | None = None
        self._link: _Link | None = None

    def hold(self, engine: VllmEngine) -> None:
        if engine.adapter is not None:
            fresh, before = self._adapters.hold(engine)
            if fresh is not before:
                self._post("/v1/load_lora_adapter", {"lora_name": fresh.name, "lora_path": fresh.path})
                if before is not None:
                    self._post("/v1/unload_lora_adapter", {"lora_name": before.name})
        elif engine is not self._holder or engine.stale:
            if self._link is None:
                world = self._post("/get_world_size", None, method="GET").get("world_size")
                if type(world) is not int or world < 1:
                    raise EndpointFailure(
                        f"the vLLM server at {self.url} does not say how many workers it has; start it with: {COMMAND}"
                    )
                self._link = _Link(engine.model, self.url, self._address, self._port, world)
            self._holder = None
            self._link.send(engine.model)
            if self._post("/reset_prefix_cache", None).get("success") is not True:
                raise EndpointFailure(
                    f"the vLLM server at {self.url} could not clear its prefix cache after new weights; does it serve others?"
                )
            self._holder = engine
        engine.stale = False

    def sample(self, jobs: Sequence[Job], engine: VllmEngine) -> list[Sampled]:
        model = self._adapters.current[engine.adapter].name if engine.adapter is not None else None
        try:
            return fan_out(
                [partial(self._one, job, model) for job in jobs], self._workers, lambda error: self._client.abort()
            )
        finally:
            self._client.close()

    def rest(self) -> None:
        """Nothing to do: its devices are its own."""

    def close(self) -> None:
        self._client.close()
        self._adapters.close()

    def _one(self, job: Job, model: str | None, stop: threading.Event) -> Sampled:
        if stop.is_set():
            raise Stopped
        body = {"token_ids": list(job.prompt_ids), "sampling_params": dict(job.params), "stream": False}
        data = self._post(
            "/inference/v1/generate", body if model is None else {**body, "model": model}, seconds=self._timeout
        )
        try:
            (choice,) = data["choices"]
            content = choice["logprobs"]["content"]
            ids = [int(i) for i in choice["token_ids"]]
            if [place["token_id"] for place in content] != ids:
                raise ValueError("log-probs of other tokens")
            return Sampled(
                token_ids=ids, logprobs=[float(p["logprob"]) for p in content], finish=choice["finish_reason"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EndpointFailure(
                f"the vLLM server at {self.url} gave a reply that cannot be read ({type(error).__name__}: {error}); is it vLLM 0.33?"
            ) from None

    def _post(
        self, path: str, body: Mapping[str, Any] | None, *, method: str = "POST", seconds: float = CONTROL_SECONDS
    ) -> Any:
        """A call's reply as a mapping; empty where it is no JSON. Raises EndpointFailure, naming what to start the server with."""
        try:
            data = None if body is None else json.dumps(body).encode()
            reply = self._client.exchange(method, path, data, timeout=seconds)
        except (OSError, HTTPException, Trouble) as error:
            raise EndpointFailure(
                f"the vLLM server at {self.url} does not answer {path} ({type(error).__name__})"
            ) from None
        if reply.status != 200:
            raise EndpointFailure(
                f"the vLLM server at {self.url} refuses {path} (status {reply.status}: {quoted(reply.body, None)}); it is started with: {COMMAND}"
            )
        try:
            found = json.loads(reply.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


class _Link:
    """The NCCL group with the server's workers, through which any policy of the one shape is sent."""

    def __init__(self, model: Any, url: str, address: str, port: int, workers: int) -> None:
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._source = _source(model)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + workers, rank=0, packed=True),
            client=HTTPVLLMWeightSyncClient(url, timeout=CONTROL_SECONDS),
            source=self._source,
        )

    def send(self, model: Any) -> None:
        self._source.module = bare(model)
        self._engine.send_weights()


def _source(model: Any) -> Any:
    """A WeightSource whose module can be exchanged for another of the same shape."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Policies(WeightSource):
        def __init__(self) -> None:
            self.module = bare(model)

        @cached_property
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p in self.module.named_parameters()]

        def iter_full(self) -> Iterator[tuple[str, Any]]:
            for name, parameter in self.module.named_parameters():
                yield name, parameter.detach()

    return Policies()


def reach_server(url: str) -> None:
    """Raises UserError where no vLLM server answers at ``url``."""
    client = HttpClient(url.rstrip("/"))
    try:
        status = client.exchange("GET", "/health", timeout=PROBE_SECONDS).status
    except (OSError, HTTPException, Trouble) as error:
        raise UserError(
            f"model.vllm.url: {url} does not answer ({type(error).__name__}); start the server ({COMMAND}), or correct the address"
        ) from None
    finally:
        client.close()
    if status != 200:
        raise UserError(
            f"model.vllm.url: {url} answers /health with status {status}; it must be a vLLM server, its address without /v1"
        )


def _own_address(url: str) -> str:
    """The address of this machine as the server sees it."""
    import socket

    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing; it asks which way leads there
        except OSError as error:
            raise UserError(
                f"model.vllm.url: {url} cannot be reached ({error.strerror}); correct the address"
            ) from None
        return probe.getsockname()[0]
