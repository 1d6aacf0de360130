"""Ask a teacher for candidate expansions: every one paid for once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from qe_edge.analysis import detect_language
from qe_edge.console import note, progress
from qe_edge.datasets import Dataset
from qe_edge.errors import BadArgument, BadInput, PartlyDone, QeEdgeError
from qe_edge.manifest import MANIFEST, check_output, read_record, run_record, write_json
from qe_edge.prompt import DEFAULT_TEACHER_PROMPT, load_teacher_prompt
from qe_edge.records import Count, Expansion, Positive
from qe_edge.train.checks import problem_of
from qe_edge.train.exemplars import Exemplars, Rule, load_exemplars
from qe_edge.train.ledger import Ledger
from qe_edge.train.pace import Budget, Pace
from qe_edge.train.teacher import (
    Answer,
    EndpointTeacher,
    LocalTeacher,
    Request,
    Teacher,
    Unanswerable,
    Unanswered,
)

EXPANSIONS = "expansions.jsonl"
# So many requests in a row that no attempt could save mean that the endpoint is down.
GIVE_UP = 20
LONGEST_WAIT = 60.0  # seconds between two attempts, unless the endpoint names a longer time


class TeachConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is asked for; a change of any of it makes new candidates.

    Of each query `n` candidates per mode, with the seeds `seed`, `seed + 1`, … `max_tokens` is the budget
    of one answer. `prompt` is a shipped prompt's id or a TOML file. `extra` holds further fields of the
    request, and takes one out where it is null.
    """

    model: str
    modes: Annotated[tuple[Literal["zero-shot", "few-shot"], ...], msgspec.Meta(min_length=1)] = (
        "zero-shot",
        "few-shot",
    )
    n: Count = 1
    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] = 1.0
    seed: int = 0
    max_tokens: Count = 256
    prompt: str = DEFAULT_TEACHER_PROMPT
    exemplars: str = ""
    exemplar_rule: Rule = "random"
    shots: Count = 4
    extra: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all n candidates would be the same; raise it or take n = 1")


class AskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How it is asked for; none of this changes a candidate.

    Without an `endpoint` the model is a local one. `timeout` is in seconds per request, prices are per
    million tokens. The budgets count everything in the output file, also from earlier runs; 0 is none.
    """

    endpoint: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: Count = 16
    timeout: Positive = 120.0
    attempts: Count = 8
    max_tokens_total: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_cost: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    price_in: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    price_out: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    keep_bad: bool = False

    def __post_init__(self) -> None:
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError(
                "a limit of cost needs the prices: give price-in and price-out per million tokens"
            )


class Job(NamedTuple):
    query_id: str
    mode: Literal["zero-shot", "few-shot"]
    sample: int


class Outcome(msgspec.Struct):
    """What a session of `teach` did. `candidates` is how many there are to be, `done` how many there are."""

    candidates: int
    done: int = 0
    asked: int = 0
    failed: int = 0
    problems: dict[str, int] = {}
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    stopped: str = ""


def teach(data: Dataset, config: TeachConfig, ask: AskConfig | None = None, *, out: Path) -> Outcome:
    """Ask for every candidate that `out/expansions.jsonl` does not hold yet.

    Raises:
        QeEdgeError: the endpoint refuses every request. What was answered before is kept.
        PartlyDone: some candidates are missing; the same call asks for them.
    """
    ask = ask or AskConfig()
    check_output(out, "teach")
    plan = Plan(data, config)
    settings = {"dataset": str(data), **msgspec.to_builtins(config), "ask": msgspec.to_builtins(ask)}
    record = run_record("teach", settings, {}) | {"sessions": read_record(out).get("sessions", [])}
    with Ledger(out / EXPANSIONS) as ledger:
        write_json(out / MANIFEST, record)
        pending = [job for job in plan if plan.key(job) not in ledger.keys]
        outcome = Outcome(candidates=len(plan), done=len(plan) - len(pending))
        error = None
        if pending:
            where = ask.endpoint or "this machine"
            note(f"teach: {len(pending)} of {len(plan)} candidates to ask of {config.model} at {where}")
            teacher = open_teacher(config, ask)
            error = asyncio.run(_Session(plan, ledger, teacher, ask, outcome).run(pending))
        outcome.problems = dict(ledger.problems)
        record["sessions"].append(msgspec.to_builtins(outcome))
        write_json(out / MANIFEST, record)
    if error is not None and not outcome.done:
        raise error
    if outcome.done < outcome.candidates:
        raise PartlyDone(
            f"{outcome.done} of {outcome.candidates} candidates are in {out / EXPANSIONS}"
            f"{f'; stopped: {outcome.stopped}' if outcome.stopped else ''}. "
            "Run the same command again for the others"
        )
    return outcome


def open_teacher(config: TeachConfig, ask: AskConfig) -> Teacher:
    """The endpoint, or the local model."""
    if ask.endpoint:
        # Local servers want no key, but the client wants one.
        key = os.environ.get(ask.api_key_env) or "none"
        return EndpointTeacher(ask.endpoint, api_key=key, timeout=ask.timeout)
    if config.extra:
        raise BadArgument("extra request fields go to an endpoint; a local model takes none")
    return LocalTeacher(config.model, max_tokens=config.max_tokens)


class Plan:
    """The candidates a configuration stands for, in the order they are asked for.

    Each query gets its first candidate before any gets its second, so that a budget that runs out leaves
    as many queries served as it can.
    """

    def __init__(self, data: Dataset, config: TeachConfig):
        self.data, self.config = data, config
        self.prompt = load_teacher_prompt(config.prompt)
        self.exemplars: Exemplars | None = None
        if "few-shot" in config.modes:
            self.exemplars = load_exemplars(
                config.exemplars, data, rule=config.exemplar_rule, shots=config.shots, seed=config.seed
            )

    def __len__(self) -> int:
        return len(self.data.queries) * len(set(self.config.modes)) * self.config.n

    def __iter__(self) -> Iterator[Job]:
        for sample in range(self.config.n):
            for mode in dict.fromkeys(self.config.modes):
                for query_id in self.data.queries:
                    yield Job(query_id, mode, sample)

    def request(self, job: Job) -> Request:
        query, config = self.data.queries[job.query_id], self.config
        shown = self.exemplars.of(query) if job.mode == "few-shot" and self.exemplars else ()
        try:
            system, user = self.prompt.messages(query, shown)
        except BadInput as error:
            raise BadInput(f"query {job.query_id!r} of {self.data}: {error}") from None
        return Request(
            model=config.model,
            system=system,
            user=user,
            temperature=config.temperature,
            seed=config.seed + job.sample,
            max_tokens=config.max_tokens,
            extra=config.extra,
        )

    def key(self, job: Job) -> str:
        """Stands for the query and all that decides its candidate, exemplars and prompt text included."""
        content = msgspec.json.encode([*job, self.request(job)], order="deterministic")
        return hashlib.sha256(content).hexdigest()[:16]

    def row(self, job: Job, answer: Answer, *, keep_bad: bool) -> Expansion:
        """An answer as a line of the output."""
        query, text = self.data.queries[job.query_id], answer.text.strip()
        problem = problem_of(query, text, answer.finish_reason)
        return Expansion(
            dataset=self.data.name,
            query_id=job.query_id,
            query=query,
            lang=detect_language(query),
            model=self.config.model,
            mode=job.mode,
            text="" if problem and not keep_bad else text,
            prompt_id=self.prompt.id,
            seed=self.config.seed + job.sample,
            temperature=self.config.temperature,
            finish_reason="length" if answer.finish_reason == "length" else "stop",
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            sample=job.sample,
            key=self.key(job),
            problem=problem,
        )


class _Session:
    """One run against a teacher: so many workers, one pace, one budget."""

    def __init__(self, plan: Plan, ledger: Ledger, teacher: Teacher, ask: AskConfig, outcome: Outcome):
        self.plan, self.ledger, self.teacher, self.ask, self.outcome = plan, ledger, teacher, ask, outcome
        self.workers = 1 if isinstance(teacher, LocalTeacher) else ask.concurrency
        self.pace = Pace(self.workers)
        self.budget = Budget(
            tokens=ask.max_tokens_total,
            cost=ask.max_cost,
            price_in=ask.price_in,
            price_out=ask.price_out,
        )
        self.budget.spend(ledger.prompt_tokens, ledger.completion_tokens)
        self.error: QeEdgeError | None = None
        self.failures_in_a_row = 0

    def stop(self, why: str, error: QeEdgeError | None = None) -> None:
        """Send out nothing more; what is in flight is waited for, since it is paid for."""
        if not self.outcome.stopped:
            self.outcome.stopped, self.error = why, error
            self.pace.stopping.set()

    async def run(self, pending: list[Job]) -> QeEdgeError | None:
        """Ask for all; returns the error that stopped it, if one did."""
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError):  # Windows has no such handlers: there Ctrl-C ends it at once
            loop.add_signal_handler(signal.SIGINT, self._interrupted, loop)
        jobs = iter(pending)
        with progress("asking", self.outcome.candidates, done=self.outcome.done) as advance:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.workers, len(pending))):
                        group.create_task(self._work(jobs, advance))
            finally:
                await self.teacher.close()
        self.outcome.prompt_tokens = self.budget.prompt_tokens
        self.outcome.completion_tokens = self.budget.completion_tokens
        self.outcome.cost = round(self.budget.cost, 6)
        return self.error

    def _interrupted(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_signal_handler(signal.SIGINT)
        note("teach: waiting for the answers that are on their way (Ctrl-C again to stop at once)")
        self.stop("interrupted")

    async def _work(self, jobs: Iterator[Job], advance: Any) -> None:
        for job in jobs:
            if self.outcome.stopped:
                return
            request = self.plan.request(job)
            size = len((request.system + request.user).encode())
            held = await self.budget.hold(size, request.max_tokens)
            if held is None:
                self.stop("the budget is spent")
                return
            try:
                answer = await self._answer(request)
                self._keep(job, answer, size)
                advance(info=self._info())
            except (Unanswered, Unanswerable) as error:
                self._failed(job, error)
            except QeEdgeError as error:
                self.stop(str(error), error)
            except OSError as error:
                why = f"can't write {self.ledger.path}: {error.strerror or error}"
                self.stop(why, QeEdgeError(why))
            finally:
                await self.budget.release(held)

    def _keep(self, job: Job, answer: Answer, prompt_bytes: int) -> None:
        self.ledger.append(self.plan.row(job, answer, keep_bad=self.ask.keep_bad))
        self.failures_in_a_row = 0
        self.outcome.asked += 1
        self.outcome.done += 1
        self.budget.spend(answer.prompt_tokens, answer.completion_tokens, prompt_bytes)
        if self.budget.limited and answer.completion_tokens is None:
            raise QeEdgeError(
                "the endpoint reports no token usage, so no budget can be kept; run without one"
            )

    async def _answer(self, request: Request) -> Answer:
        """Ask until there is an answer, or the attempts are used up."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_any

        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(Unanswered),
            stop=stop_any(stop_after_attempt(self.ask.attempts), lambda _: self.pace.stopping.is_set()),
            wait=_wait,
            sleep=self.pace.sleep,
            reraise=True,
        ):
            with attempt:
                async with self.pace.slot() as started:
                    try:
                        answer = await self.teacher.ask(request)
                    except Unanswered as error:
                        if error.throttled:
                            self.pace.throttled(started, error.retry_after)
                        raise
                self.pace.answered()
        return answer

    def _failed(self, job: Job, error: Exception) -> None:
        if self.pace.stopping.is_set():
            return  # given up early, not failed
        self.outcome.failed += 1
        self.failures_in_a_row += 1
        note(f"teach: no answer for query {job.query_id} ({job.mode}, sample {job.sample}): {error}")
        if self.failures_in_a_row >= GIVE_UP:
            why = f"{GIVE_UP} requests in a row failed, the last with: {error}"
            self.stop(why, QeEdgeError(why))

    def _info(self) -> str:
        spent = self.budget
        parts = [f"{spent.prompt_tokens + spent.completion_tokens:,} tokens"]
        if spent.cost:
            parts.append(f"cost {spent.cost:.2f}")
        parts.append(f"{int(self.pace.allowed)} at once")
        if self.outcome.failed:
            parts.append(f"{self.outcome.failed} failed")
        return ", ".join(parts)


def _wait(state: Any) -> float:
    """Seconds to the next attempt: what the endpoint names, else doubling from 1, with jitter."""
    from tenacity import wait_random_exponential

    error = state.outcome.exception()
    named = getattr(error, "retry_after", None)
    backoff = wait_random_exponential(multiplier=1, max=LONGEST_WAIT)(state)
    return named + min(backoff, 1.0) if named is not None else backoff
