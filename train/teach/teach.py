"""Ask a teacher for candidate expansions: every one paid for once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.console import note, progress
from qe_edge.errors import BadArgument, QeEdgeError
from qe_edge.records import Expansion
from qe_edge.retrieval.datasets import Dataset
from qe_edge.train.teach.address import read_key
from qe_edge.train.teach.config import AskConfig, TeachConfig
from qe_edge.train.teach.ledger import Ledger
from qe_edge.train.teach.pace import LONGEST_WAIT, Budget, Pace, Stopped
from qe_edge.train.teach.plan import Job, Plan
from qe_edge.train.teach.refusals import Refused, Unanswerable, Unanswered
from qe_edge.train.teach.teacher import Answer, EndpointTeacher, LocalTeacher, Request, Teacher
from qe_edge.work.files import MANIFEST, write_json
from qe_edge.work.runs import check_output, read_record, run_record

EXPANSIONS = "expansions.jsonl"
# So many requests in a row that no attempt could save mean that the endpoint is down.
GIVE_UP = 20
TOGETHER = 8  # answers of a local model: more bring little
# Seconds in which the first answer must come: a wrong address is told at once, an outage waited for.
FIRST_PATIENCE = 15.0


class Outcome(msgspec.Struct):
    """What a session of `teach` did.

    `candidates` is how many there are to be, `done` how many of them there are; all else is of this session.
    """

    candidates: int
    done: int = 0
    asked: int = 0
    failed: int = 0
    problems: dict[str, int] = {}
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    stopped: str = ""


def teach(data: Dataset, config: TeachConfig, *, out: Path) -> Outcome:
    """Ask for every candidate that `out/expansions.jsonl` does not hold yet.

    When it could not get all, the outcome says so; the same call asks for the others.

    Raises:
        QeEdgeError: nothing could be got at all. What was answered in earlier sessions is kept.
    """
    check_output(out, "teach")
    # A wrong address or key is told before anything is written.
    teacher: Teacher | None = open_endpoint(config) if config.endpoint else None
    own = None
    if "student" in config.modes:
        teacher = student = open_local(config)
        own = student.prompt
    plan = Plan(data, config, own)
    settings = {"dataset": str(data), **msgspec.to_builtins(config)}
    with Ledger(out / EXPANSIONS) as ledger:
        record = run_record("teach", settings, {}) | {"sessions": read_record(out).get("sessions", [])}
        write_json(out / MANIFEST, record)
        pending = [job for job in plan if plan.key(job) not in ledger.keys]
        outcome = Outcome(candidates=len(plan), done=len(plan) - len(pending))
        error = None
        if pending:
            where = config.endpoint or "this machine"
            note(f"teach: {len(pending)} of {len(plan)} candidates to ask of {config.model} at {where}")
            teacher = teacher or open_local(config)
            error = asyncio.run(_Session(plan, ledger, teacher, outcome).run(pending))
        record["sessions"].append(msgspec.to_builtins(outcome))
        write_json(out / MANIFEST, record)
    if error is not None and (not outcome.done or not isinstance(error, QeEdgeError)):
        raise error
    return outcome


def open_endpoint(ask: AskConfig) -> EndpointTeacher:
    """The endpoint; nothing is sent to it yet."""
    return EndpointTeacher(ask.endpoint, api_key=read_key(ask.api_key_env), timeout=ask.timeout)


def open_local(config: TeachConfig) -> LocalTeacher:
    """The model on this machine."""
    if config.extra:
        raise BadArgument("extra request fields go to an endpoint; a local model takes none")
    return LocalTeacher(
        config.model, max_tokens=config.max_tokens, parallel=min(config.concurrency, TOGETHER)
    )


class _Session:
    """One run against a teacher: so many workers, one pace, one budget."""

    def __init__(self, plan: Plan, ledger: Ledger, teacher: Teacher, outcome: Outcome):
        self.plan, self.ledger, self.teacher, self.outcome = plan, ledger, teacher, outcome
        self.ask: AskConfig = plan.config
        self.workers = teacher.parallel if isinstance(teacher, LocalTeacher) else self.ask.concurrency
        self.pace = Pace(self.workers)
        self.budget = Budget(
            tokens=self.ask.max_tokens_total,
            cost=self.ask.max_cost,
            price_in=self.ask.price_in,
            price_out=self.ask.price_out,
        )
        self.budget.spend(*ledger.tokens.get(plan.config.model, (0, 0)))
        self.error: Exception | None = None
        self.problems: Counter[str] = Counter()
        self.failures_in_a_row = 0
        self.throttled = False
        self.refused: list[Job] = []

    def stop(self, why: str, error: Exception | None = None) -> None:
        """Send out nothing more; what is in flight is waited for, since it is paid for."""
        if not self.outcome.stopped:
            self.outcome.stopped, self.error = why, error
            self.pace.stopping.set()

    async def run(self, pending: list[Job]) -> Exception | None:
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
        if self.outcome.asked and not self.error:
            self._mark_refused()
        self.outcome.problems = dict(self.problems)
        self.outcome.cost = round(
            self.budget.price(self.outcome.prompt_tokens, self.outcome.completion_tokens), 6
        )
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
            held = await self.budget.hold(size, request.most_tokens)
            if held is None:
                self.stop("the budget is spent")
                return
            try:
                answer = await self._answer(request)
                self._keep(job, answer, size)
                advance(info=self._info())
            except Stopped:
                return
            except Unanswerable as error:
                self.refused.append(job)
                self._failed(job, error)
            except (Unanswered, Refused) as error:
                self._failed(job, error)
            except OSError as error:
                why = f"can't write {self.ledger.path}: {error.strerror or error}"
                self.stop(why, QeEdgeError(why))
            except Exception as error:  # also a fault of ours must not lose what is on its way
                self.stop(str(error), error)
            finally:
                await self.budget.release(held)

    def _keep(self, job: Job, answer: Answer, prompt_bytes: int) -> None:
        self._write(self.plan.row(job, answer, keep_bad=self.ask.keep_bad))
        self._mark_refused()
        self.failures_in_a_row = 0
        self.outcome.asked += 1
        self.outcome.prompt_tokens += answer.prompt_tokens or 0
        self.outcome.completion_tokens += answer.completion_tokens or 0
        self.budget.spend(answer.prompt_tokens, answer.completion_tokens, prompt_bytes)
        if self.budget.limited and answer.completion_tokens is None:
            raise QeEdgeError(
                "the endpoint reports no token usage, so no budget can be kept; run without one"
            )

    def _mark_refused(self) -> None:
        """The endpoint works, so what it refused is refused for what it is."""
        for refused in self.refused:
            self._write(self.plan.refused(refused))
        self.refused.clear()

    def _write(self, row: Expansion) -> None:
        self.ledger.append(row)
        self.outcome.done += 1
        if row.problem:
            self.problems[row.problem] += 1

    async def _answer(self, request: Request) -> Answer:
        """Ask until there is an answer or patience ends; waiting for a rate limit costs no patience."""
        failures, since = 0, None
        while True:
            try:
                async with self.pace.slot() as started:
                    answer = await self.teacher.ask(request)
                self.pace.answered()
                return answer
            except Unanswered as error:
                if error.throttled:
                    if not self.throttled:
                        self.throttled = True
                        note(f"teach: the endpoint asks for fewer requests, which it gets: {error}")
                    if wait := self.pace.throttled(started, error.retry_after):
                        note(f"teach: the endpoint's rate limit holds everything back for {wait:.0f} s")
                    continue
                since = since or started
                failures += 1
                patience = self.ask.patience if self.outcome.asked else min(self.ask.patience, FIRST_PATIENCE)
                if time.monotonic() - since >= patience:
                    raise
                # Doubling, with jitter so that requests that failed together do not come back together.
                backoff = random.uniform(0, min(LONGEST_WAIT, 2.0**failures))
                await self.pace.sleep(error.retry_after if error.retry_after is not None else backoff)

    def _failed(self, job: Job, error: Exception) -> None:
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
