"""The bell: who waits for something in the database is woken when it has changed.

A topic is a response's id (it begins or ends), `said` of it (its journal), `QUEUE` (something waits to be run) or
`ASKED` (something is asked of an owner). In this process the writer rings when it has committed; between
processes PostgreSQL carries the topics (NOTIFY, once for each transaction), and SQLite nothing.

What must stay true: a ring only wakes. Whoever is woken looks into the database, and looks now and then
without being woken; so a ring that is lost costs time and nothing else.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

logger = logging.getLogger(__name__)

QUEUE = "queue"
ASKED = "asked"
CHANNEL = "responses_ingress"

_MOST_PAYLOAD = 7_500  # bytes; PostgreSQL takes 7,999
_RECONNECT = 1.0  # seconds
_PROBE = 15.0


def said(response_id: str) -> str:
    """The topic of a response's journal, which is rung for many times a second."""
    return f"{response_id}:said"


class Ear:
    """What one listener waits for."""

    def __init__(self, bell: "Bell") -> None:
        self._bell = bell
        self._rung = asyncio.Event()
        self._topics: set[str] = set()

    def add(self, topic: str) -> bool:
        """Listen for `topic` too; False where it does already."""
        if topic in self._topics:
            return False
        self._topics.add(topic)
        self._bell.listening.setdefault(topic, set()).add(self)
        return True

    def wake(self) -> None:
        self._rung.set()

    async def heard(self, patience: float) -> bool:
        """Wait for a ring since the last call, `patience` seconds at most; whether there was one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._rung.wait()
        rung = self._rung.is_set()
        self._rung.clear()
        return rung

    def close(self) -> None:
        for topic in self._topics:
            others = self._bell.listening[topic]
            others.discard(self)
            if not others:
                del self._bell.listening[topic]


class Bell:
    """Wakes those who listen in this process."""

    def __init__(self) -> None:
        self.listening: dict[str, set[Ear]] = {}

    @contextmanager
    def listen(self, *topics: str) -> Iterator[Ear]:
        """Listen for these topics, until the block ends."""
        ear = Ear(self)
        for topic in topics:
            ear.add(topic)
        try:
            yield ear
        finally:
            ear.close()

    def ring(self, topics: Iterable[str]) -> None:
        for topic in topics:
            for ear in self.listening.get(topic, ()):
                ear.wake()

    def ring_all(self) -> None:
        """Wake everybody: something may have been missed."""
        self.ring(list(self.listening))


def payloads(topics: Iterable[str]) -> list[str]:
    """The topics as NOTIFY carries them, in as few pieces as it takes."""
    found: list[str] = []
    for topic in topics:
        if found and len(found[-1]) + len(topic) < _MOST_PAYLOAD:
            found[-1] += f" {topic}"
        else:
            found.append(topic)
    return found


async def hear(engine: AsyncEngine, bell: Bell, probe: float = _PROBE) -> None:
    """Ring `bell` for what other processes tell through PostgreSQL, until cancelled. A connection that is lost
    is made again, and then everybody is woken; each `probe` seconds it is looked whether it is lost in silence."""
    while True:
        try:
            await _hear_once(engine, bell, probe)
        except Exception as error:  # SQLAlchemy's, or the driver's own: without this no other worker is heard
            logger.warning("listening to other workers is interrupted: %s", type(error).__name__)
        await asyncio.sleep(_RECONNECT)


async def _hear_once(engine: AsyncEngine, bell: Bell, probe: float) -> None:
    """Listen until the connection is lost."""
    lost = asyncio.Event()
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        driver.add_termination_listener(lambda _: lost.set())
        await driver.add_listener(CHANNEL, _ringer(bell))
        bell.ring_all()
        try:
            while not await _set_within(lost, probe):
                await connection.exec_driver_sql("SELECT 1")
        finally:
            await connection.invalidate()


async def _set_within(event: asyncio.Event, patience: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            await event.wait()
    return event.is_set()


def _ringer(bell: Bell) -> Callable[[Any, int, str, str], None]:
    def ring(_connection: Any, _process: int, _channel: str, payload: str) -> None:
        topics: Sequence[str] = payload.split(" ")
        bell.ring(topics)

    return ring
