import asyncio
from collections.abc import Sequence

import pytest

from responses_ingress.core.builder import Event
from responses_ingress.runs.feed import Feed, Follower
from tests.runs.stage import loop_turns


def event(number: int) -> Event:
    return Event(number, "response.odd", b"{}")


def numbers(events: Sequence[Event]) -> list[int]:
    return [event.number for event in events]


class Deserted:
    """Counts how often a feed was deserted."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.fixture
def deserted() -> Deserted:
    return Deserted()


@pytest.fixture
def feed(deserted: Deserted) -> Feed:
    return Feed(deserted)


async def read_all(follower: Follower, most: int = 64) -> list[int]:
    read: list[int] = []
    while not follower.done:
        read += numbers(await follower.next(most))
    return read


async def test_a_follower_gets_what_was_published_before_it_came(feed: Feed) -> None:
    feed.publish([event(0), event(1)])
    with feed.follow() as follower:
        assert numbers(await follower.next(64)) == [0, 1]


async def test_next_gives_at_most_what_it_was_asked_for_and_goes_on_from_there(feed: Feed) -> None:
    feed.publish([event(number) for number in range(5)])
    with feed.follow() as follower:
        assert numbers(await follower.next(2)) == [0, 1]
        assert numbers(await follower.next(2)) == [2, 3]
        assert numbers(await follower.next(2)) == [4]


async def test_next_waits_for_what_is_not_there_yet(feed: Feed) -> None:
    with feed.follow() as follower:
        reading = asyncio.create_task(follower.next(64))
        await loop_turns()
        assert not reading.done()
        feed.publish([event(0)])
        assert numbers(await reading) == [0]


async def test_every_follower_reads_at_its_own_pace(feed: Feed) -> None:
    with feed.follow() as quick, feed.follow() as slow:
        reading = asyncio.create_task(read_all(quick))
        for number in range(3):
            feed.publish([event(number)])
            await loop_turns()
        assert numbers(await slow.next(1)) == [0]
        feed.end()
        assert await reading == [0, 1, 2]
        assert await read_all(slow) == [1, 2]


async def test_a_follower_of_an_ended_feed_reads_it_to_its_end(feed: Feed) -> None:
    feed.publish([event(0)])
    feed.end()
    with feed.follow() as follower:
        assert not follower.done
        assert await read_all(follower) == [0]
        assert numbers(await follower.next(64)) == []


async def test_who_began_behind_the_end_is_given_the_event_that_ended_it(feed: Feed) -> None:
    """A crash took away what it had seen; the end has the number of an event that it saw, or a lower one."""
    with feed.follow(3) as at_end, feed.follow(2) as before:
        feed.publish([event(0), event(1), event(2)])
        assert at_end.lost is None  # it may go on
        feed.end()
        assert at_end.lost == event(2)
        assert numbers(await before.next(9)) == [2]
        assert before.lost is None


async def test_the_end_wakes_who_waits_for_an_event(feed: Feed) -> None:
    with feed.follow() as follower:
        reading = asyncio.create_task(follower.next(64))
        await loop_turns()
        feed.end()
        assert numbers(await reading) == []
        assert follower.done


async def test_who_waits_for_the_end_is_not_woken_by_events(feed: Feed) -> None:
    with feed.follow() as follower:
        waiting = asyncio.create_task(follower.end())
        for number in range(3):
            feed.publish([event(number)])
            await loop_turns()
        assert not waiting.done()
        feed.end()
        await waiting


async def test_a_wake_lets_next_return_with_nothing(feed: Feed) -> None:
    with feed.follow() as follower:
        follower.wake()  # nobody waits: no matter
        reading = asyncio.create_task(follower.next(64))
        await loop_turns()
        follower.wake()
        follower.wake()
        assert numbers(await reading) == []
        assert not follower.done


async def test_leaving_wakes_whoever_waits_and_gives_nothing_more(feed: Feed) -> None:
    feed.publish([event(0)])
    with feed.follow() as follower:
        await follower.next(64)
        reading, waiting = asyncio.create_task(follower.next(64)), asyncio.create_task(feed.follow().end())
        await loop_turns()
        follower.leave()
        feed.publish([event(1)])
        assert numbers(await reading) == []
        assert follower.done
        assert numbers(await follower.next(64)) == []
        assert not waiting.done()  # that is another follower
        feed.end()
        await waiting


async def test_leaving_ends_the_wait_for_the_end(feed: Feed) -> None:
    follower = feed.follow()
    waiting = asyncio.create_task(follower.end())
    await loop_turns()
    follower.leave()
    await waiting
    assert not feed.ended


async def test_a_feed_is_followed_while_anyone_follows(feed: Feed) -> None:
    assert not feed.followed
    with feed.follow():
        with feed.follow():
            pass
        assert feed.followed
    assert not feed.followed


async def test_a_feed_tells_once_when_its_last_follower_leaves(feed: Feed, deserted: Deserted) -> None:
    with feed.follow() as first:
        with feed.follow():
            pass
        assert deserted.times == 0
        first.leave()
        first.leave()
        assert deserted.times == 1
    assert deserted.times == 1
    with feed.follow():
        pass
    assert deserted.times == 2


async def test_an_ended_feed_is_deserted_by_nobody(feed: Feed, deserted: Deserted) -> None:
    with feed.follow():
        feed.end()
    with feed.follow():
        pass
    assert deserted.times == 0


async def test_leaving_leaves_nothing_behind_even_when_reading_raises(feed: Feed) -> None:
    with pytest.raises(RuntimeError), feed.follow():
        raise RuntimeError
    assert not feed.followed
    feed.publish([event(0)])


async def test_a_crowd_is_woken_for_several_events_at_once_and_for_the_end_without_delay(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("responses_ingress.runs.feed._PAUSE", 0.01)  # a second for a hundred
    followers = [feed.follow() for _ in range(100)]
    waiting = [asyncio.create_task(follower.next(64)) for follower in followers]
    await loop_turns()
    feed.publish([event(0)])
    await loop_turns()
    assert not any(task.done() for task in waiting)
    feed.publish([event(1)])
    assert [numbers(events) for events in await asyncio.gather(*waiting)] == [[0, 1]] * 100
    ends = [asyncio.create_task(follower.end()) for follower in followers]
    await loop_turns()
    feed.publish([event(2)])
    feed.end()
    await loop_turns()
    assert all(task.done() for task in ends)
