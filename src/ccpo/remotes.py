"""Agents behind endpoints: the engines and readers of a recipe's ``agents.NAME.remote``, and whether they can be reached."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from ccpo.comm import Comm
from ccpo.config import RunConfig
from ccpo.engines.base import Engine
from ccpo.engines.http import Secret
from ccpo.engines.remote import Endpoint, RemoteEngine
from ccpo.engines.sharded import FirstAlone
from ccpo.engines.vllm_server import reach_server
from ccpo.learner.loading import load_tokenizer
from ccpo.teams import ChatReader
from ccpo.teams.reader import reader_of


class Remotes:
    """The engine and the reader of each such agent. Agents whose sections are equal share an engine: its connections and its budget.
    Of several ranks the first alone asks, and needs the key; ``voices`` are what all of them speak through."""

    def __init__(self, config: RunConfig, agents: tuple[str, ...], comm: Comm | None = None) -> None:
        comm = comm or Comm()
        self.engines: dict[str, RemoteEngine] = {}
        self.voices: dict[str, Engine] = {}
        self._sections = {a: config.agents[a].remote for a in agents if a in config.agents and config.agents[a].remote}
        made: dict[str, tuple[RemoteEngine, Engine]] = {}
        for agent, section in self._sections.items():
            text = section.model_dump_json()
            if text not in made:
                engine = RemoteEngine(_endpoint(f"agents.{agent}.remote", section, asks=comm.first))
                made[text] = engine, engine if comm.size == 1 else _of_first(engine, comm)
            self.engines[agent], self.voices[agent] = made[text]

    def __bool__(self) -> bool:
        return bool(self.engines)

    def probe(self) -> None:
        """Ask every endpoint once, all at a time, where its section wants it. Raises EndpointRefusal."""
        wanted = {id(e): e for a, e in self.engines.items() if self._sections[a].probe}
        if not wanted:
            return
        with ThreadPoolExecutor(max_workers=min(16, len(wanted))) as pool:
            for asked in [pool.submit(engine.probe) for engine in wanted.values()]:
                asked.result()

    def readers(self) -> dict[str, ChatReader]:
        """How each agent's prompts are measured. Raises UserError for a tokenizer that cannot be loaded."""
        names = {a: section.tokenizer for a, section in self._sections.items()}
        counters = {name: reader_of(load_tokenizer(name)) for name in dict.fromkeys(names.values()) if name}
        return {agent: ChatReader(counter=counters.get(name)) for agent, name in names.items()}

    def spent(self) -> dict[str, dict[str, int]]:
        """What each has cost, by the first agent that speaks through it."""
        return {agent: asdict(engine.spent) for agent, engine in self._by_first_agent().items()}

    def load(self, spent: Mapping[str, Mapping[str, int]]) -> None:
        """Put back what :meth:`spent` gave before."""
        for agent, engine in self._by_first_agent().items():
            engine.load(spent.get(agent, {}))

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for agent, engine in self._by_first_agent().items():
            spent = engine.spent
            counts = {
                "requests": spent.requests,
                "retries": spent.retries,
                "tokens": spent.total,
                "estimated_tokens": spent.estimated_tokens,
            }
            found |= {f"remote/{agent}/{name}": float(count) for name, count in counts.items()}
        return found

    def _by_first_agent(self) -> dict[str, RemoteEngine]:
        first: dict[int, str] = {}
        for agent, engine in self.engines.items():
            first.setdefault(id(engine), agent)
        return {agent: self.engines[agent] for agent in first.values()}


def reach(config: RunConfig, agents: tuple[str, ...]) -> None:
    """Find out, before anything expensive starts, that every key is set, and that every endpoint and vLLM server answers. Raises UserError."""
    if config.model.engine == "vllm" and config.model.vllm.url is not None:
        reach_server(config.model.vllm.url)
    Remotes(config, agents).probe()


def _of_first(engine: RemoteEngine, comm: Comm) -> FirstAlone:
    """The engine as several ranks have it: the first asks, and what has been spent is known to all."""
    return FirstAlone(engine, comm, tell=lambda: asdict(engine.spent), hear=engine.load)


def _endpoint(where: str, section: Any, *, asks: bool) -> Endpoint:
    wanted = section.key_env if asks else None
    secret = Secret.of_environment(wanted, f"{where}.key_env") if wanted else None
    return Endpoint(
        where=where,
        url=section.url.rstrip("/"),
        model=section.model,
        secret=secret,
        concurrency=section.concurrency,
        timeout=section.timeout,
        retries=section.retries,
        max_total_tokens=section.max_total_tokens,
        token_limit=section.token_limit,
        extra=section.extra,
    )
