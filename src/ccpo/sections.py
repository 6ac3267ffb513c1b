"""What every section of a recipe is, and the sections of vLLM and of agents behind an endpoint."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ccpo.addresses import check_url


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("Input should not be true or false (YAML reads yes, no, on and off so; quote them)")
        return value


class VllmSection(Section):
    """How ``model.engine: vllm`` runs."""

    memory: float = Field(0.45, gt=0, lt=1, description="share of the GPU's memory that vLLM takes")
    sleep: bool = Field(True, description="give that memory to the learner during updates")
    eager: bool = Field(False, description="no CUDA graphs: less memory, slower")
    url: str | None = Field(
        None, description="a vLLM server on devices of its own, without /v1; null: within this process"
    )
    port: int = Field(51216, ge=1, le=65535, description="where the server's workers meet the learner to get weights")
    concurrency: int = Field(256, ge=1, le=4096, description="requests at once to the server")
    timeout: float = Field(600.0, gt=0, le=86_400, description="seconds for one request to the server")

    @model_validator(mode="after")
    def _usable(self) -> VllmSection:
        wrong = check_url(self.url) if self.url is not None else None
        if wrong:
            raise ValueError(f"url cannot be used: {wrong}")
        return self


class RemoteSection(Section):
    """An OpenAI-compatible endpoint that an agent speaks through. The agent is never trained; the key stays in the environment."""

    url: str = Field(description="address up to /v1; chat completions are asked of it")
    model: str = Field(min_length=1, description="the model's name at the endpoint")
    key_env: str | None = Field(
        None, description="the environment variable that holds the key; null: the endpoint wants none"
    )
    concurrency: int = Field(8, ge=1, le=1024, description="requests at once")
    timeout: float = Field(60.0, gt=0, le=86_400, description="seconds for one attempt")
    retries: int = Field(
        5, ge=0, le=100, description="further attempts after 429, 5xx, a time-out, a cut or unreadable reply"
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="budget of prompt and completion tokens; the run stops and is saved when it is spent"
    )
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the endpoint calls the most tokens of a completion"
    )
    tokenizer: str | None = Field(
        None, description="a tokenizer like the endpoint's, to measure prompts; null: four characters are a token"
    )
    probe: bool = Field(True, description="ask for the list of models before anything starts")
    extra: dict[str, Any] = Field({}, description="further fields of each request; null takes one away")

    @model_validator(mode="after")
    def _safe(self) -> RemoteSection:
        """What is refused here is not shown: it may be a key."""
        wrong = check_url(self.url)
        if wrong:
            raise ValueError(f"url cannot be used: {wrong}")
        if self.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_env):
            raise ValueError(
                "key_env is the name of an environment variable, in capitals (EXAMPLE_KEY), and never the key itself"
            )
        for name in self.extra:
            if name in ("model", "messages", "stream", "n", self.token_limit):
                raise ValueError(
                    f"extra.{name} is set by the library; use the other keys of this section and of rollout"
                )
            if re.search(r"api_?key|authorization|password|secret", name, re.IGNORECASE):
                raise ValueError(
                    "extra holds what looks like a key; put it in an environment variable and name it in key_env"
                )
        try:
            json.dumps(self.extra, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("extra must hold only what JSON can write: texts, numbers, lists, mappings") from None
        return self
