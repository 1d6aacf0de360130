"""A session against a teacher: so many workers, one pace, one budget, and a ledger that loses nothing."""

from __future__ import annotations

import asyncio
import difflib
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from qe_edge.console import note, progress, several, warn
from qe_edge.errors import BadArgument, NotFound, QeEdgeError
from qe_edge.train.teach.address import read_key
from qe_edge.train.teach.config import AskConfig
from qe_edge.train.teach.ledger import Ledger, Row
from qe_edge.train.teach.pace import LONGEST_WAIT, Budget, Pace, Stopped
from qe_edge.train.teach.refusals import Refused, Unanswerable, Unanswered
from qe_edge.train.teach.teacher import Answer, EndpointTeacher, LocalTeacher, Request, Teacher

# So many requests in a row that no attempt could save mean that the endpoint is down, or, before its first
# answer, that it isn't there.
GIVE_UP, GIVE_UP_FIRST = 20, 4
# So many first answers without a word, each cut by its budget, are a model's that thinks before it writes.
SILENT = 8
# An answer that takes this share of its time limit came from a server that keeps requests waiting.
SLOW = 0.25
SHOWN = 5  # models of an endpoint, where none has a name like the one that is asked for
TOGETHER = 8  # answers of a local model: more bring little
INTERRUPTED = "interrupted"  # why a session stopped that Ctrl-C ended
SPENT = "what is left of the budget is too little for one more answer"
# Seconds in which the first answer must come: a wrong address is told at once, an outage waited for.
FIRST_PATIENCE = 15.0

J = TypeVar("J")
R = TypeVar("R", bound=Row)
R_co = TypeVar("R_co", bound=Row, covariant=True)


class Plan(Protocol[J, R_co]):
    """What is to be asked for, in this order, and the line that each answer becomes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[J]: ...

    def request(self, job: J) -> Request: ...

    def key(self, job: J) -> str:
        """Stands for all that decides the answer."""
        ...

    def name(self, job: J) -> str:
        """For a message."""
        ...

    def row(self, job: J, answer: Answer, *, keep_bad: bool) -> R_co: ...


class Outcome(msgspec.Struct):
    """What a session did.

    `candidates` is how many answers there are to be, `done` how many of them there are; all else is of this
    session.
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


def open_teacher(ask: AskConfig, *, max_tokens: int) -> Teacher:
    """The endpoint, to which nothing is sent yet, or the model on this machine."""
    if ask.endpoint:
        return EndpointTeacher(ask.endpoint, api_key=read_key(ask.api_key_env), timeout=ask.timeout)
    return open_local(ask, max_tokens=max_tokens)


def open_local(ask: AskConfig, *, max_tokens: int) -> LocalTeacher:
    """The model on this machine."""
    if ask.extra:
        raise BadArgument("extra request fields go to an endpoint; a local model takes none")
    try:
        return LocalTeacher(ask.model, max_tokens=max_tokens, parallel=min(ask.concurrency, TOGETHER))
    except NotFound as error:
        raise NotFound(f"{error}; a server's model needs the server's address: --endpoint URL") from None


def ask_all(
    plan: Plan[J, R], ledger: Ledger[R], ask: AskConfig, teacher: Teacher | None = None, *, max_tokens: int
) -> tuple[Outcome, Exception | None]:
    """Ask for all that the ledger lacks; returns what was done, and the error that stopped it, if one did.

    `teacher` is one that is open already; else it is opened when something is to be asked.
    """
    pending = [job for job in plan if plan.key(job) not in ledger.keys]
    outcome = Outcome(candidates=len(plan), done=len(plan) - len(pending))
    if not pending:
        return outcome, None
    where = ask.endpoint or "this machine"
    teacher = teacher or open_teacher(ask, max_tokens=max_tokens)
    note(f"{ledger.command}: {len(pending)} of {len(plan)} {ledger.what} to ask of {ask.model} at {where}")
    if others := len(ledger.keys) - outcome.done:
        there = several(others, "answer")
        note(
            f"{ledger.command}: {there} by another model, prompt or setting, or to another query, stay there"
        )
    return outcome, asyncio.run(_Session(plan, ledger, teacher, outcome, ask).run(pending))


def check_done(outcome: Outcome, error: Exception | None) -> None:
    """Raise what stopped a session, unless it got something first: then the outcome tells."""
    if error is not None and (not outcome.done or not isinstance(error, QeEdgeError)):
        raise error


class _Session(Generic[J, R]):
    def __init__(
        self, plan: Plan[J, R], ledger: Ledger[R], teacher: Teacher, outcome: Outcome, ask: AskConfig
    ):
        self.plan, self.ledger, self.teacher, self.outcome, self.ask = plan, ledger, teacher, outcome, ask
        self.workers = teacher.parallel if isinstance(teacher, LocalTeacher) else self.ask.concurrency
        self.pace = Pace(self.workers)
        self.slow = math.inf if isinstance(teacher, LocalTeacher) else SLOW * ask.timeout  # seconds
        self.budget = Budget(
            tokens=self.ask.max_tokens_total,
            cost=self.ask.max_cost,
            price_in=self.ask.price_in,
            price_out=self.ask.price_out,
        )
        self.budget.spend(*ledger.tokens.get(ask.model, (0, 0)))
        self.error: Exception | None = None
        self.problems: Counter[str] = Counter()
        self.failures_in_a_row = 0
        self.last_failure = ""
        self.silent = 0
        self.throttled = self.hoping = False
        self.refused: list[J] = []

    def _tell(self, message: str) -> None:
        note(f"{self.ledger.command}: {message}")

    def stop(self, why: str, error: Exception | None = None) -> None:
        """Send out nothing more; what is in flight is waited for, since it is paid for."""
        if not self.outcome.stopped:
            self.outcome.stopped, self.error = why, error
            self.pace.stopping.set()

    async def run(self, pending: list[J]) -> Exception | None:
        """Ask for all; returns the error that stopped it, if one did."""
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError):  # Windows has no such handlers: there Ctrl-C ends it at once
            loop.add_signal_handler(signal.SIGINT, self._interrupted, loop)
        listed, model = await self.teacher.models(), self.ask.model
        # A server of one model often takes any name. Ollama's tag `latest` may be left out.
        if listed and not {model, f"{model}:latest"} & set(listed):
            near = difflib.get_close_matches(model, listed) or listed[:SHOWN]
            warn(f"{self.ask.endpoint} doesn't list a model {model!r}; it lists {', '.join(near)}")
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
        self._tell(f"waiting for {self.pace.flying} answers on their way (Ctrl-C again to stop at once)")
        self.stop(INTERRUPTED)

    async def _work(self, jobs: Iterator[J], advance: Any) -> None:
        for job in jobs:
            if self.outcome.stopped:
                return
            request = self.plan.request(job)
            size = len((request.system + request.user).encode())
            held = await self.budget.hold(size, request.most_tokens)
            if held is None:
                self.stop(SPENT)
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

    def _keep(self, job: J, answer: Answer, prompt_bytes: int) -> None:
        self._write(self.plan.row(job, answer, keep_bad=self.ask.keep_bad))
        self._mark_refused()
        self.failures_in_a_row = 0
        self.outcome.asked += 1
        self.silent += answer.finish_reason == "length" and not answer.text.strip()
        if self.silent == self.outcome.asked == SILENT:
            raise QeEdgeError(
                f"the first {SILENT} answers are empty, as a model's that thinks until its budget ends: "
                """switch that off in its server's words, such as """
                """--extra '{"chat_template_kwargs": {"enable_thinking": false}}', or take another model"""
            )
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
            nothing = Answer("", "content_filter", 0, 0)
            self._write(self.plan.row(refused, nothing, keep_bad=False))
        self.refused.clear()

    def _write(self, row: R) -> None:
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
                self.pace.answered(slowly=time.monotonic() - started > self.slow)
                return answer
            except Unanswered as error:
                if error.throttled:
                    if not self.throttled:
                        self.throttled = True
                        self._tell(f"the endpoint asks for fewer requests, which it gets: {error}")
                    if wait := self.pace.throttled(started, error.retry_after):
                        self._tell(f"the endpoint's rate limit holds everything back for {wait:.0f} s")
                    continue
                if error.late and self.pace.late(started):
                    self._tell(f"{error}, so at most {int(self.pace.allowed)} at once from now on")
                since = since or started
                failures += 1
                patience = self.ask.patience if self.outcome.asked else min(self.ask.patience, FIRST_PATIENCE)
                left = since + patience - time.monotonic()
                if left <= 0:
                    raise
                if not self.outcome.asked and not self.hoping:
                    self.hoping = True
                    self._tell(f"trying for {left:.0f} s more: {error}")
                # Doubling, with jitter so that requests that failed together do not come back together.
                backoff = random.uniform(0, min(LONGEST_WAIT, left, 2.0**failures))
                await self.pace.sleep(error.retry_after if error.retry_after is not None else backoff)

    def _failed(self, job: J, error: Exception) -> None:
        self.outcome.failed += 1
        self.failures_in_a_row += 1
        if not self.outcome.stopped:
            why = "the same" if str(error) == self.last_failure else str(error)
            self._tell(f"no answer for {self.plan.name(job)}: {why}")
        self.last_failure = str(error)
        if self.failures_in_a_row >= (GIVE_UP if self.outcome.asked else GIVE_UP_FIRST):
            why = f"{self.failures_in_a_row} requests in a row failed, the last with: {error}"
            self.stop(why, QeEdgeError(f"{why} (once it answers, the same command goes on)"))

    def _info(self) -> str:
        now = self.outcome
        parts = [f"{now.prompt_tokens + now.completion_tokens:,} tokens"]
        if cost := self.budget.price(now.prompt_tokens, now.completion_tokens):
            parts.append(f"cost {cost:.2f}")
        parts.append(f"{int(self.pace.allowed)} at once")
        if self.outcome.failed:
            parts.append(f"{self.outcome.failed} failed")
        return ", ".join(parts)
