"""An agent behind an OpenAI-compatible endpoint: chat completions over HTTP, at most so many at once, retried, within a budget of tokens.

The endpoint is not trusted. Every reply is bounded in time and size and checked field by field; a text is cut at the stop strings and
cleared of what cannot be written as UTF-8, and of the key. No token or log-prob is seen: an agent like this is never trained.
"""

from __future__ import annotations

import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException
from typing import Any

from ccpo.engines.fan_out import Stopped, fan_out
from ccpo.engines.http import HttpClient, Reply, Secret, Trouble, quoted
from ccpo.engines.replies import Said, model_names, read_reply
from ccpo.errors import EndpointFailure, EndpointRefusal, nearest
from ccpo.types import Completion, Request

PROBE_SECONDS = 8.0
RETRIED = {408, 409, 425, 429}  # and every 5xx but 501 and 505
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_ASKED = 0.5, 30.0, 300.0  # seconds
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an agent is asked and how. ``where`` is the recipe's section, for errors. ``timeout`` is in seconds and for one attempt;
    ``max_total_tokens`` counts prompts and completions; ``extra`` are further fields of the request, null takes one away."""

    where: str
    url: str
    model: str
    secret: Secret | None = None
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 5
    max_total_tokens: int | None = None
    token_limit: str = "max_tokens"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Spent:
    """What an endpoint has been asked and has cost. ``estimated_tokens`` are those of the other two counts that it did not report."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated_tokens: int = 0

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class BudgetSpent(EndpointFailure):
    """The endpoint's budget of tokens is spent."""


class RemoteEngine:
    """Speaks through an endpoint; see `ccpo.engines.base.Engine`. ``spent`` counts over the engine's life, and over a run's resumes
    where its owner puts the earlier counts back."""

    positions = None

    def __init__(self, endpoint: Endpoint, *, first_pause: float = FIRST_PAUSE) -> None:
        self.endpoint, self.spent = endpoint, Spent()
        self._client = HttpClient(endpoint.url, endpoint.secret)
        self._first_pause = first_pause
        self._lock = threading.Lock()
        self._random = random.Random()

    @property
    def prefill_tokens(self) -> int:
        return self.spent.prompt_tokens

    @property
    def decoded_tokens(self) -> int:
        return self.spent.completion_tokens

    def refresh(self) -> None:
        """Nothing to do: its weights are not ours."""

    def load(self, counts: Mapping[str, int]) -> None:
        """Go on counting from what was spent before."""
        self.spent = Spent(**{name: int(counts.get(name, 0)) for name in asdict(Spent())})

    def probe(self, seconds: float = PROBE_SECONDS) -> None:
        """Ask for the endpoint's models, once. Raises EndpointRefusal where nothing answers, the key is refused, or the model is not
        among those listed. An endpoint without such a list passes."""
        at = f"{self.endpoint.where}.url: {self.endpoint.url}"
        fix = "start the server, correct the address, or set remote.probe: false"
        try:
            reply = self._client.exchange("GET", "/models", timeout=seconds)
        except ssl.SSLCertVerificationError as error:
            raise self._certificate(error) from None
        except (OSError, HTTPException, Trouble) as error:
            raise EndpointRefusal(f"{at} does not answer ({_words(error)}); {fix}") from None
        finally:
            self._client.close()
        if reply.status in (401, 403) or 300 <= reply.status < 400:
            raise self._refusal(reply)
        if reply.status >= 500:
            raise EndpointRefusal(f"{at} answers with status {reply.status}; {fix}")
        names = model_names(reply.body) if reply.status == 200 else []
        if names and self.endpoint.model not in names:
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise EndpointRefusal(
                f"{self.endpoint.where}.model: the endpoint does not list {self.endpoint.model!r}; it has {shown}."
                f"{nearest(self.endpoint.model, names)} Where it knows names that it does not list, set remote.probe: false"
            )

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order. Raises EndpointFailure where retries do not help or the budget of tokens is spent
        (requests under way then are waited for, since they are paid), EndpointRefusal for what no retry can help. No thread is left."""
        if not requests:
            return []
        calls = [partial(self._one, request) for request in requests]
        try:
            return fan_out(calls, self.endpoint.concurrency, self._give_up)
        finally:
            self._client.close()

    def _give_up(self, error: BaseException) -> None:
        if not isinstance(error, BudgetSpent):
            self._client.abort()

    def _one(self, request: Request, stop: threading.Event) -> Completion:
        body = json.dumps(self._body(request)).encode()
        why, asked = "", None
        for attempt in range(self.endpoint.retries + 1):
            if attempt and stop.wait(self._pause(attempt, asked)):
                raise Stopped
            self._check_budget()
            if stop.is_set():
                raise Stopped
            with self._lock:
                self.spent.requests += 1
                self.spent.retries += attempt > 0
            try:
                reply = self._client.exchange("POST", "/chat/completions", body, timeout=self.endpoint.timeout)
                asked = _retry_after(reply)
                if reply.status == 200:
                    return self._completion(request, reply)
            except ssl.SSLCertVerificationError as error:
                raise self._certificate(error) from None
            except (OSError, HTTPException, Trouble) as error:
                why, asked = _words(error), None
                continue
            if not _is_retried(reply.status):
                raise self._refusal(reply)
            why = f"status {reply.status}: {quoted(reply.body, self.endpoint.secret)}"
        tries = self.endpoint.retries + 1
        raise EndpointFailure(
            f"{self.endpoint.where}.url: {self.endpoint.url} gave no usable reply in {tries} {'try' if tries == 1 else 'tries'} "
            f"(last: {why}); look at the server, or raise remote.retries or remote.timeout"
        )

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": role, "content": writable(text)} for role, text in request.messages],
            self.endpoint.token_limit: request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed % 2**31,
        }
        if request.top_p < 1:
            body["top_p"] = request.top_p
        if request.stop:
            body["stop"] = list(request.stop)
        return {name: value for name, value in {**body, **self.endpoint.extra}.items() if value is not None}

    def _completion(self, request: Request, reply: Reply) -> Completion:
        """What a reply says, counted whether it can be used or not. Raises Trouble."""
        said = read_reply(reply.body, request.stop)
        self._count(request, said)
        if said.trouble:
            raise Trouble(said.trouble)
        text = self.endpoint.secret.scrub(said.text) if self.endpoint.secret else said.text
        return Completion(
            token_ids=(),
            logprobs=(),
            text=writable(text),
            finish=said.finish,
            counted=self._tokens(said.generated, said.text),
        )

    def _tokens(self, reported: int | None, text: str) -> int:
        return -(-len(text) // 4) if reported is None else reported

    def _count(self, request: Request, said: Said) -> None:
        if said.generated is None and said.trouble:
            return
        prompt = self._tokens(said.prompt, "".join(text for _, text in request.messages))
        completion = self._tokens(said.generated, said.text)
        guessed = (prompt if said.prompt is None else 0) + (completion if said.generated is None else 0)
        with self._lock:
            first = guessed > 0 and self.spent.estimated_tokens == 0
            self.spent.prompt_tokens += prompt
            self.spent.completion_tokens += completion
            self.spent.estimated_tokens += guessed
        if first:
            log.warning(
                "%s: the endpoint reports no usage; its tokens are estimated at 4 characters each", self.endpoint.where
            )

    def _check_budget(self) -> None:
        budget = self.endpoint.max_total_tokens
        if budget is not None and self.spent.total >= budget:
            guessed = f", {self.spent.estimated_tokens:,} of them estimated" if self.spent.estimated_tokens else ""
            raise BudgetSpent(
                f"{self.endpoint.where}.max_total_tokens: the budget of {budget:,} tokens is spent ({self.spent.total:,} in "
                f"{self.spent.requests:,} requests{guessed})"
            )

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Seconds before a retry: what the endpoint asked for, else doubling with a jitter of up to a half."""
        pause = min(LONGEST_PAUSE, self._first_pause * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.0)
        return pause if asked is None else min(LONGEST_ASKED, max(pause, asked))

    def _refusal(self, reply: Reply) -> EndpointRefusal:
        """The sentence for a status that no retry helps."""
        where, status, key = self.endpoint.where, reply.status, self.endpoint.secret
        if status in (401, 403):
            if key is None:
                return EndpointRefusal(
                    f"{where}.key_env: the endpoint wants a key (status {status}); put it in an environment variable and name that here"
                )
            return EndpointRefusal(
                f"{where}.key_env: the endpoint refuses the key in {key.name} (status {status}); set a valid one"
            )
        if 300 <= status < 400:
            return EndpointRefusal(
                f"{where}.url: {self.endpoint.url} redirects (status {status}), and redirects are not followed, so that no key goes "
                "astray; set the final address"
            )
        said = quoted(reply.body, key)
        if status == 404:
            return EndpointRefusal(
                f"{where}.url and .model: {self.endpoint.url}/chat/completions or the model {self.endpoint.model!r} is not there "
                f"(status 404: {said}); the address usually ends in /v1"
            )
        return EndpointRefusal(
            f"{where}.model, .extra or .token_limit: the endpoint refuses the request for {self.endpoint.model!r} (status {status}: {said})"
        )

    def _certificate(self, error: ssl.SSLCertVerificationError) -> EndpointRefusal:
        return EndpointRefusal(
            f"{self.endpoint.where}.url: the certificate of {self.endpoint.url} is not valid ({error.verify_message}); correct the "
            "address, or point SSL_CERT_FILE at the authority that signed it"
        )


def writable(text: str) -> str:
    """``text`` without lone surrogates, which UTF-8 cannot write."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_retried(status: int) -> bool:
    return status in RETRIED or (status >= 500 and status not in (501, 505))


def _retry_after(reply: Reply) -> float | None:
    """Seconds that the endpoint asks to wait: a number, or a date; None where it says nothing that can be read."""
    value = reply.headers.get("retry-after", "").strip()
    if value.isascii() and value.replace(".", "", 1).isdigit() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _words(error: Exception) -> str:
    """An exchange's failure in a few words that quote nothing that was sent."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, Trouble):
        return str(error)
    reason = getattr(error, "strerror", None)
    return f"{type(error).__name__}: {reason}" if isinstance(reason, str) else type(error).__name__
