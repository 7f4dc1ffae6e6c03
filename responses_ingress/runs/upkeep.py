"""The upkeep: what a process does for the database's sake, again and again. It renews its leases, looks for
responses that nobody runs, does what other processes ask of its runs, and deletes what is past.

What must stay true: leases are renewed before anything else is looked for, so that a process that was held up
does not take over what is its own; one fault ends nothing: every chore is done again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.errors import IngressError, StoreUnavailable
from responses_ingress.runs.runner import Runner
from responses_ingress.store.database import Database
from responses_ingress.store.queue import answered, asked_of, claim_left_behind, claim_queued, is_any_due, renew_leases
from responses_ingress.store.responses import StoredResponse
from responses_ingress.store.retention import (
    MOST,
    delete_chosen,
    delete_expired,
    delete_idle_threads,
    drop_journals,
    find_beyond,
)
from responses_ingress.store.wake import ASKED, QUEUE, Ear

logger = logging.getLogger(__name__)

_LOOK = 0.5
"""Seconds between two looks for work: what a dead process left behind is found within its lease and a second."""

_BREATH = 0.05
"""Seconds between two transactions of a sweep, which take a fraction of it: what is written meanwhile goes first."""

Sweep = Callable[[AsyncConnection], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Retention:
    """When things are deleted that do not say so themselves. most_responses: of a tenant, None is all.
    threads: seconds from their last use on, None is for ever. interval: seconds between two sweeps."""

    most_responses: int | None = None
    threads: float | None = None
    interval: float = 60.0


class Upkeep:
    """The chores of one process. Open it in the running loop; close it after its runner."""

    def __init__(self, database: Database, runner: Runner, retention: Retention) -> None:
        self._database = database
        self._runner = runner
        self._retention = retention
        self._lease = runner.owner.lease
        self._renewed = -float("inf")
        self._no_recovery_before = 0.0
        self._stopping = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._keep_up(), name="runs-upkeep"),
            asyncio.create_task(self._keep_leases(), name="runs-leases"),
            asyncio.create_task(self._keep_tidy(), name="runs-retention"),
        ]

    async def close(self) -> None:
        self._stopping.set()
        await asyncio.gather(*self._tasks)
        await self._runner.close(0)  # what was claimed when the runner closed

    async def _keep_up(self) -> None:
        """Renew leases three times per lease, and look for work when the bell rings or `_LOOK` has passed."""
        with self._database.bell.listen(QUEUE, ASKED) as ear:
            stopped = asyncio.create_task(self._stopping.wait())
            stopped.add_done_callback(lambda _: ear.wake())
            while not self._stopping.is_set():
                await self._chores()
                await self._pause(ear)
            await stopped

    async def _keep_leases(self) -> None:
        """Renew leases whatever else is under way: seeing to what was left behind can take longer than a lease."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease / 6):
                    await self._stopping.wait()
            try:
                await self._renew()
            except StoreUnavailable as error:
                logger.warning("leases cannot be renewed: %s", error.message)
            except Exception:  # the next time is soon
                logger.exception("leases cannot be renewed")

    async def _pause(self, ear: Ear) -> None:
        if not self._stopping.is_set():
            await ear.heard(min(_LOOK, self._lease / 3))

    async def _chores(self) -> None:
        try:
            await self._renew()
            await self._answer()
            await self._find_work()
        except StoreUnavailable as error:
            logger.warning("upkeep is put off: %s", error.message)
            # Every process may have been cut off from the database, and none could renew: first let all do so.
            self._renewed = -float("inf")
            self._no_recovery_before = asyncio.get_running_loop().time() + self._lease
        except Exception:  # without upkeep, leases lapse and threads are given away while they are busy
            logger.exception("upkeep failed")

    async def _renew(self) -> None:
        """By the clock that leases are counted by: a host that was asleep finds all of its own run out."""
        if 0 <= self._database.clock() - self._renewed < self._lease / 3:
            return
        await self._database.keep_time()
        await self._renew_now()
        self._renewed = self._database.clock()

    async def _renew_now(self) -> None:
        leased = self._runner.leased
        if leased:
            async with self._database.transaction() as connection:
                until = self._database.clock() + self._lease
                await renew_leases(connection, self._runner.owner.name, leased, until)

    async def _answer(self) -> None:
        if self._runner.leased:
            async with self._database.reading() as connection:
                asked = await asked_of(connection, self._runner.owner.name)
            for response_id in await self._runner.answer(asked):
                await self._database.submit(answered(response_id))

    async def _find_work(self) -> None:
        """Claim what waits for a worker, and what has lost its own."""
        if self._runner.closing:
            return
        async with self._database.reading() as connection:
            if not await is_any_due(connection, self._database.clock()):
                return
        owner, now = self._runner.owner, self._database.clock()
        if not 0 <= now - self._renewed <= self._lease / 2:
            raise StoreUnavailable("The database took so long to answer that leases may have lapsed unrenewed.")
        left: list[StoredResponse] = []
        async with self._database.transaction() as connection:
            if asyncio.get_running_loop().time() >= self._no_recovery_before:
                left = await claim_left_behind(connection, owner, now)
            queued = await claim_queued(connection, owner, now, self._runner.free) if self._runner.free > 0 else []
        await _each(left, self._runner.recover)
        await _each(queued, self._runner.take_up)
        if left:
            await self._renew_now()  # threads too: their leases ran out with those of their turns

    async def _keep_tidy(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retention.interval):
                    await self._stopping.wait()
            for sweep in self._sweeps():
                await self._try(self._sweep(sweep))
            if (most := self._retention.most_responses) is not None:
                await self._try(self._thin_out(most))

    @staticmethod
    async def _try(sweeping: Awaitable[None]) -> None:
        try:
            await sweeping
        except StoreUnavailable as error:
            logger.warning("a sweep is put off: %s", error.message)
        except Exception:  # the other sweeps, and the next ones, are still to be done
            logger.exception("a sweep failed")

    def _sweeps(self) -> Sequence[Sweep]:
        now, retention = self._database.clock(), self._retention
        sweeps: list[Sweep] = [
            lambda connection: drop_journals(connection, now),
            lambda connection: delete_expired(connection, now),
        ]
        if (kept := retention.threads) is not None:
            sweeps.append(lambda connection: delete_idle_threads(connection, now - kept))
        return sweeps

    async def _sweep(self, sweep: Sweep) -> None:
        """Sweep in small transactions, between which others write, until there is nothing left."""
        while not self._stopping.is_set():
            async with self._database.transaction() as connection:
                if not await sweep(connection):
                    return
            await asyncio.sleep(_BREATH)

    async def _thin_out(self, most: int) -> None:
        """Choose many at a time, which reads much, and delete in small transactions."""
        while True:
            async with self._database.reading() as connection:
                chosen = await find_beyond(connection, most)
            deleted = 0
            for start in range(0, len(chosen), MOST):
                if self._stopping.is_set():
                    return
                async with self._database.transaction() as connection:
                    deleted += await delete_chosen(connection, chosen[start : start + MOST])
                await asyncio.sleep(_BREATH)
            if not deleted:
                return


async def _each(rows: Sequence[StoredResponse], see_to: Callable[[StoredResponse], Awaitable[None]]) -> None:
    """See to each row; one that fails is left to its lease and is in nobody's way."""
    for row, result in zip(rows, await asyncio.gather(*map(see_to, rows), return_exceptions=True), strict=True):
        if isinstance(result, IngressError):
            logger.info("response %s is left to its lease: %s", row.id, result.message)
        elif isinstance(result, BaseException):
            logger.error("response %s was left behind and cannot be seen to", row.id, exc_info=result)
