"""Trees against a model that copies lists. What is present must be what the living need, to the item."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import exists, or_, select

from responses_ingress.store.tables import branches, responses
from tests.store.desk import Clock, Desk, at_desk
from tests.store.test_retention import NOTHING, idle, rewritten, rows

steps = st.lists(st.tuples(st.sampled_from("tfd"), st.integers(0, 30)), min_size=1, max_size=20)


@given(steps)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_any_tree_exactly_what_is_needed_is_kept(
    copy_of_database: Callable[[], str], steps: list[tuple[str, int]]
) -> None:
    async def play() -> None:
        async with at_desk(copy_of_database(), Clock()) as desk:
            made: dict[str, list[str]] = {}
            for number, (what, which) in enumerate(steps):
                at = list(made)[which % len(made)] if made else None
                if what == "d":
                    if at is not None:
                        await desk.delete(at)
                        del made[at]
                else:
                    place = desk.chain() if at is None else await desk.after(at)
                    status = "failed" if what == "f" else "completed"
                    id = await desk.turn(place, f"{number}", f"{number}!", status=status)
                    if what == "f":
                        await desk.delete(id)
                    else:
                        made[id] = [*made.get(at or "", ()), f"{number}", f"{number}!"]
                await check(desk, made)
            for id in list(made):
                await desk.delete(id)
            assert await rows(desk) == NOTHING

    asyncio.run(play())


async def check(desk: Desk, made: dict[str, list[str]]) -> None:
    for id, history in made.items():
        assert await desk.lineage(id) == history
    assert await desk.count("items") == len({text for history in made.values() for text in history})
    grown = branches.alias()
    holds = or_(
        exists().where(responses.c.branch_id == branches.c.id),
        exists().where(grown.c.parent_branch == branches.c.id, grown.c.parent_position > branches.c.parent_position),
    )
    async with desk.database.reading() as connection:
        assert (await connection.execute(select(branches.c.id).where(~holds))).all() == []


turns = st.lists(st.tuples(st.sampled_from("tTuUd"), st.integers(0, 30)), min_size=1, max_size=16)


@given(turns)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_session_that_is_rewritten_anywhere_keeps_every_history_and_leaves_nothing(
    copy_of_database: Callable[[], str], turns: list[tuple[str, int]]
) -> None:
    async def play() -> None:
        async with at_desk(copy_of_database(), Clock()) as desk:
            made: dict[str, list[str]] = {}
            history: list[str] = []
            for number, (what, which) in enumerate(turns):
                if what == "d":
                    if made:
                        gone = list(made)[which % len(made)]
                        await desk.delete(gone)
                        del made[gone]
                else:
                    position = which % (len(history) + 1)
                    place = await rewritten(desk, position)
                    if what.isupper():  # one that another process goes on with knows no better
                        place = replace(place, holder=None)
                    id = await desk.turn(place, f"{number}", f"{number}!", store=what in "tT")
                    history = [*history[:position], f"{number}", f"{number}!"]
                    if what in "tT":
                        made[id] = history
                if history:
                    assert await desk.history() == history
                for id, lineage in made.items():
                    assert await desk.lineage(id) == lineage
            desk.clock.now += 100
            await idle(desk, 50)
            await check(desk, made)
            for id in list(made):
                await desk.delete(id)
            assert await rows(desk) == NOTHING

    asyncio.run(play())
