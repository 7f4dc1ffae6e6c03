"""Reading what lies on a branch: whole, in order, across forks, and with one query however many they are."""

import asyncio
from collections.abc import AsyncIterator, Callable

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.core.context import Stored
from responses_ingress.core.items import digest
from responses_ingress.ids import named_thread
from responses_ingress.store.engine import read_engine
from responses_ingress.store.history import find_items, find_thread, read_digests, read_items, read_payloads
from responses_ingress.store.tables import branches, items
from tests.store.desk import Clock, Desk, at_desk, texts


@pytest.fixture
async def connection(each_database: str) -> AsyncIterator[AsyncConnection]:
    """A reading connection to the desk's database."""
    engine = read_engine(each_database)
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


def statements(connection: AsyncConnection) -> list[str]:
    """The statements run on the connection from now on."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(connection.sync_connection, "before_cursor_execute", note)
    return seen


async def make_branch(desk: Desk, id: str, parent: str | None, at: int, count: int) -> None:
    """A branch with `count` items of its own, written as they would be; item n of branch b is called "b/n"."""
    payload = '{{"type":"message","content":"{}/{}"}}'
    rows = [
        {
            "branch_id": id,
            "position": at + n,
            "tenant": "",
            "item_id": f"msg_{id}_{n}",
            "type": "message" if n % 2 else "reasoning",
            "digest": f"{id}/{n}".encode(),
            "payload": payload.format(id, n).encode(),
        }
        for n in range(count)
    ]
    branch = {
        "id": id,
        "tenant": "",
        "thread_id": "thread_1",
        "parent_branch": parent,
        "parent_position": at,
        "head": at + count,
    }
    async with desk.database.transaction() as connection:
        await connection.execute(insert(branches), branch)
        if rows:
            await connection.execute(insert(items), rows)


async def test_two_hundred_forks_are_read_with_one_statement(desk: Desk, connection: AsyncConnection) -> None:
    expected: list[str] = []
    parent = None
    for number in range(200):
        await make_branch(desk, f"b{number}", parent, len(expected), 3)
        kept = 2 if number < 199 else 3  # the next branch begins before this one's last item
        expected += [f"b{number}/{n}" for n in range(kept)]
        parent = f"b{number}"
    seen = statements(connection)
    found = texts(await read_payloads(connection, "b199", 0, len(expected)))
    assert found == expected
    assert len(found) == 401
    assert len(seen) == 1
    assert len(await read_digests(connection, "b199", 401)) == len(await read_items(connection, "b199", 0, 401)) == 401
    assert len(seen) == 3


async def test_forks_of_a_session_are_read_with_one_statement_each_turn(
    desk: Desk, connection: AsyncConnection
) -> None:
    """The same through turns: every one rewrites the last item before it."""
    response_id = await desk.turn(desk.chain(), "0", "0!")
    for number in range(1, 30):
        await desk.turn(await desk.after(response_id), "a child that keeps the branch", "")
        response_id = await desk.turn(await desk.after(response_id), str(number), f"{number}!")
    row = await desk.row(response_id)
    assert row.branch_id is not None and row.stop is not None
    seen = statements(connection)
    found = texts(await read_payloads(connection, row.branch_id, 0, row.stop))
    assert found == [text for number in range(30) for text in (str(number), f"{number}!")]
    assert len(seen) == 1
    assert await desk.count("branches") == 30


TREE = [
    ("root", None, 0, 4),
    ("left", "root", 2, 3),
    ("right", "root", 4, 1),
    ("leaf", "left", 5, 2),
    ("low", "leaf", 1, 2),  # begins before its parent and its parent's parent do
    ("anew", "leaf", 0, 2),
]
LINES = {
    "root": ["root/0", "root/1", "root/2", "root/3"],
    "left": ["root/0", "root/1", "left/0", "left/1", "left/2"],
    "right": ["root/0", "root/1", "root/2", "root/3", "right/0"],
    "leaf": ["root/0", "root/1", "left/0", "left/1", "left/2", "leaf/0", "leaf/1"],
    "low": ["root/0", "low/0", "low/1"],
    "anew": ["anew/0", "anew/1"],
}


@pytest.mark.parametrize("branch", LINES)
async def test_a_slice_of_a_branch_is_that_slice_of_its_history(
    desk: Desk, connection: AsyncConnection, branch: str
) -> None:
    for place in TREE:
        await make_branch(desk, *place)
    line = LINES[branch]
    for stop in range(len(line) + 1):
        for first in range(stop + 1):
            assert texts(await read_payloads(connection, branch, first, stop)) == line[first:stop]
    assert [stored.digest.decode() for stored in await read_digests(connection, branch, len(line))] == line
    found = await read_items(connection, branch, 1, len(line))
    assert [orjson.loads(item.payload)["content"] for item in found] == line[1:]
    assert [item.item_id for item in found] == ["msg_" + text.replace("/", "_") for text in line[1:]]


async def test_a_branch_that_has_gone_on_is_read_as_far_as_asked(desk: Desk, connection: AsyncConnection) -> None:
    first = await desk.turn(desk.chain(), "a", "1")
    before = await desk.row(first)
    await desk.turn(await desk.after(first), "b", "2")
    assert before.branch_id is not None
    assert texts(await read_payloads(connection, before.branch_id, 0, 2)) == ["a", "1"]
    assert texts(await read_payloads(connection, before.branch_id, 0, 4)) == ["a", "1", "b", "2"]


async def test_what_is_not_there_is_empty(desk: Desk, connection: AsyncConnection) -> None:
    assert await read_payloads(connection, "no such branch", 0, 10) == []
    await make_branch(desk, "empty", None, 0, 0)
    assert await read_payloads(connection, "empty", 0, 10) == []


async def test_alignment_gets_types_and_digests(desk: Desk, connection: AsyncConnection) -> None:
    response_id = await desk.turn(desk.chain(), "a", "1")
    row = await desk.row(response_id)
    assert row.branch_id is not None
    assert await read_digests(connection, row.branch_id, 2) == [
        Stored("message", digest({"type": "message", "role": "user", "content": "a"})),
        Stored("message", digest({"type": "message", "role": "assistant", "content": "1"})),
    ]


async def test_a_thread_is_found_with_its_active_branch_and_by_its_tenant_only(
    desk: Desk, connection: AsyncConnection
) -> None:
    await desk.turn(await desk.session("s", "t"), "a", "1", memory=b"{}")
    thread_id = named_thread("t", "s")
    found = await find_thread(connection, "t", thread_id)
    assert found is not None
    assert (found.id, found.head, found.running, found.memory) == (thread_id, 2, None, b"{}")
    assert texts(await read_payloads(connection, found.active_branch, 0, found.head)) == ["a", "1"]
    assert await find_thread(connection, "", thread_id) is None
    assert await find_thread(connection, "t", named_thread("t", "another")) is None


async def test_items_are_found_by_their_ids_and_tenant_only(desk: Desk, connection: AsyncConnection) -> None:
    response_id = await desk.turn(desk.chain("t"), "a", "1")
    row = await desk.row(response_id, "t")
    assert row.branch_id is not None
    stored = await read_items(connection, row.branch_id, 0, 2)
    ids = [item.item_id for item in stored]
    seen = statements(connection)
    found = await find_items(connection, "t", [*ids, "msg_unknown", ids[0]])
    assert found == {item.item_id: item.payload for item in stored}
    assert len(seen) == 1
    assert await find_items(connection, "", ids) == {}
    assert await find_items(connection, "t", []) == {}


async def test_of_several_copies_the_tenants_at_the_highest_position_is_found(
    desk: Desk, connection: AsyncConnection
) -> None:
    copies = [("t", "b1", 1), ("t", "b2", 7), ("t", "b3", 7), ("t", "b4", 3), ("other", "b5", 9)]
    rows = [
        {
            "branch_id": branch,
            "position": position,
            "tenant": tenant,
            "item_id": "msg_1",
            "type": "message",
            "digest": b"",
            "payload": f"{tenant}'s at {position}".encode(),
        }
        for tenant, branch, position in copies
    ]
    async with desk.database.transaction() as writing:
        await writing.execute(insert(items), rows)
    assert await find_items(connection, "t", ["msg_1"]) == {"msg_1": b"t's at 7"}
    assert await find_items(connection, "other", ["msg_1"]) == {"msg_1": b"other's at 9"}


# A tree of turns against a model that copies lists.

moves = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=12)


@given(moves)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_of_turns_reads_as_if_every_response_had_a_copy_of_its_history(
    copy_of_database: Callable[[], str], moves: list[tuple[int, int]]
) -> None:
    async def play() -> None:
        async with at_desk(copy_of_database(), Clock()) as desk:
            made: list[tuple[str, list[str]]] = [(await desk.turn(desk.chain(), "root", "!"), ["root", "!"])]
            for number, (parent, kind) in enumerate(moves):
                before, history = made[parent % len(made)]
                status = "failed" if kind == 3 else "completed"
                id = await desk.turn(await desk.after(before), f"{number}", f"{number}!", status=status)
                if status == "completed":
                    made.append((id, [*history, f"{number}", f"{number}!"]))
            for id, history in made:
                assert await desk.lineage(id) == history
            assert await desk.count("items") == 2 * len(made)

    asyncio.run(play())
