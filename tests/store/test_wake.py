"""The bell: who listens is woken by what was committed, in this process and in others; a ring lost costs time only."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import URL, make_url, text

from responses_ingress.store.database import Database
from responses_ingress.store.engine import listen_engine
from responses_ingress.store.wake import CHANNEL, Bell, hear, payloads
from responses_ingress.store.writer import Batch, Unit
from tests.conftest import run_on
from tests.store.desk import Clock

LONG = 30.0  # a ring comes long before


def rings(*topics: str) -> Unit[None]:
    def apply(batch: Batch) -> None:
        for topic in topics:
            batch.ring(topic)

    return Unit(apply)


# In one process.


async def test_who_listens_to_a_topic_is_woken_and_nobody_else() -> None:
    bell = Bell()
    with bell.listen("a", "b") as both, bell.listen("b") as one, bell.listen("c") as none:
        bell.ring(["b"])
        assert [await ear.heard(0) for ear in (both, one, none)] == [True, True, False]
        bell.ring(["a"])
        assert [await ear.heard(0) for ear in (both, one, none)] == [True, False, False]


async def test_a_ring_before_one_waits_is_not_lost_and_counts_once() -> None:
    bell = Bell()
    with bell.listen("a") as ear:
        bell.ring(["a", "a"])
        bell.ring(["a"])
        assert await ear.heard(0)
        assert not await ear.heard(0)


async def test_who_waits_is_woken_at_once() -> None:
    bell = Bell()
    with bell.listen("a") as ear:
        waiting = asyncio.create_task(ear.heard(LONG))
        await asyncio.sleep(0)
        bell.ring(["a"])
        assert await waiting


async def test_an_ear_can_listen_for_more_and_is_told_whether_it_is_new() -> None:
    bell = Bell()
    with bell.listen("a") as ear:
        assert (ear.add("b"), ear.add("b"), ear.add("a")) == (True, False, False)
        bell.ring(["b"])
        assert await ear.heard(0)


async def test_an_ear_can_be_woken_by_hand() -> None:
    with Bell().listen() as ear:
        ear.wake()
        assert await ear.heard(0)


async def test_everybody_is_woken_where_something_may_have_been_missed() -> None:
    bell = Bell()
    with bell.listen("a") as one, bell.listen("b", "c") as other:
        bell.ring_all()
        assert [await ear.heard(0) for ear in (one, other)] == [True, True]


async def test_a_bell_forgets_who_has_left() -> None:
    bell = Bell()
    with bell.listen("a") as one:
        with bell.listen("a", "b") as other:
            other.add("c")
        assert bell.listening == {"a": {one}}
    assert bell.listening == {}
    bell.ring(["a"])


# Between processes.


@pytest.fixture
async def pair(postgres_database: str) -> AsyncIterator[tuple[Database, Database]]:
    """Two processes' databases, both listening."""
    here, there = await listening(postgres_database), await listening(postgres_database)
    yield here, there
    await here.close()
    await there.close()


async def listening(url: str) -> Database:
    """A database that hears the others: who has just begun to listen is woken, as something may have been missed."""
    database = Database(url, Clock())
    with database.bell.listen("anything") as ear:
        assert await ear.heard(LONG)
    return database


async def test_another_process_is_woken(pair: tuple[Database, Database]) -> None:
    here, there = pair
    with there.bell.listen("resp_1") as ear, there.bell.listen("resp_2") as deaf:
        await here.submit(rings("resp_0", "resp_1"))
        assert await ear.heard(LONG)
        assert not await deaf.heard(0)


async def test_a_crowd_of_topics_reaches_another_process(pair: tuple[Database, Database]) -> None:
    """More than one notification can hold."""
    here, there = pair
    topics = [f"resp_{number:050}" for number in range(1000)]
    ears = [there.bell.listen(topic) for topic in topics]
    found = [ear.__enter__() for ear in ears]
    await here.submit(rings(*topics))
    assert all([await ear.heard(LONG) for ear in found])
    for ear in ears:
        ear.__exit__(None, None, None)


async def test_what_is_not_committed_reaches_nobody(pair: tuple[Database, Database]) -> None:
    here, there = pair

    def breaks(batch: Batch) -> None:
        batch.ring("a")
        batch.add(text("INSERT INTO no_such_table (x) VALUES (:x)"), x=1)

    with there.bell.listen("a") as ear, there.bell.listen("b") as later:
        await asyncio.gather(here.submit(Unit(breaks)), return_exceptions=True)
        await here.submit(rings("b"))
        assert await later.heard(LONG)
        assert not await ear.heard(0)


LISTENERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}' AND query LIKE 'LISTEN%'"


async def test_a_listener_that_lost_its_connection_is_woken_and_listens_again(
    postgres: URL, postgres_database: str, pair: tuple[Database, Database]
) -> None:
    here, there = pair
    for _ in range(2):
        with there.bell.listen("a") as ear:
            await run_on(postgres, LISTENERS.format(make_url(postgres_database).database))
            assert await ear.heard(LONG)  # it may have missed something
            await here.submit(rings("a"))
            assert await ear.heard(LONG)


async def test_a_listener_waits_for_a_server_that_is_down(postgres: URL, postgres_database: str) -> None:
    name = make_url(postgres_database).database
    await run_on(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    database = Database(postgres_database, Clock())
    with database.bell.listen("a") as ear:
        assert not await ear.heard(0.1)
        await run_on(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert await ear.heard(LONG)
    await database.close()


class Torn(Bell):
    """A bell at which something unforeseen happens, the first time."""

    torn = False

    def ring_all(self) -> None:
        if not self.torn:
            self.torn = True
            raise RuntimeError("unforeseen")
        super().ring_all()


async def test_whatever_happens_listening_goes_on(postgres_database: str) -> None:
    """The driver raises errors of its own where a connection breaks just as listening begins."""
    engine = listen_engine(postgres_database)
    bell = Torn()
    hearing = asyncio.create_task(hear(engine, bell))
    with bell.listen("a") as ear:
        assert await ear.heard(LONG)
        assert bell.torn
    hearing.cancel()
    await asyncio.gather(hearing, return_exceptions=True)
    await engine.dispose()


# What a notification holds.


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters=" "), min_size=1, max_size=60), max_size=600))
def test_topics_are_told_in_pieces_that_postgresql_takes(topics: list[str]) -> None:
    pieces = payloads(topics)
    assert [topic for piece in pieces for topic in piece.split(" ")] == topics
    assert all(len(piece.encode()) < 8000 for piece in pieces)
    assert len(pieces) <= 1 + sum(map(len, topics)) * 2 // 7_500


def test_no_topics_are_no_notification() -> None:
    assert payloads([]) == []
    assert CHANNEL.isidentifier()
