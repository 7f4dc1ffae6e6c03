"""A worker's desk for tests of the store: one open database, a clock moved by hand, numbered randomness,
and the few steps every test takes. Items are user and assistant messages, told by their text.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import orjson
from sqlalchemy import Table, func, select

from responses_ingress.core.items import digest
from responses_ingress.ids import Ids, named_thread, partition_of
from responses_ingress.store.database import Database
from responses_ingress.store.history import ThreadHead, find_thread, read_payloads
from responses_ingress.store.queue import claim_left_behind, claim_queued, enqueue, renew_leases
from responses_ingress.store.responses import StoredResponse, find_response, load
from responses_ingress.store.retention import delete_response
from responses_ingress.store.tables import metadata
from responses_ingress.store.turns import append_journal, begin, end
from responses_ingress.store.values import Ending, Entry, NewItem, NewResponse, Owner, Placement
from responses_ingress.store.writer import Unit

NOW = 1_760_000_000.0
LEASE = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Desk:
    """What one worker does. Several desks may stand at one database; `seed` keeps their ids apart."""

    def __init__(self, database: Database, clock: Clock, seed: int = 0) -> None:
        self.database = database
        self.clock = clock
        self.ids = Ids(clock, Random(seed).randbytes)
        self.owner = Owner(f"worker {seed}", 1, LEASE)

    def item(self, text: str, role: str = "user") -> NewItem:
        body: dict[str, Any] = {"type": "message", "role": role, "content": text}
        item = {"id": self.ids.item("message", "0" * 16), **body}
        return NewItem(item["id"], "message", digest(item), orjson.dumps(item))

    def items(self, *texts: str) -> list[NewItem]:
        return [self.item(text) for text in texts]

    # Where turns go.

    def chain(self, tenant: str = "") -> Placement:
        """The place of a first turn that names no thread."""
        partition = self.ids.partition()
        root = self.ids.branch(partition)
        thread_id = self.ids.make("thread", partition)
        return Placement(tenant, thread_id, None, root, 0, 0, self.ids.branch(partition), root)

    async def after(self, response_id: str, tenant: str = "") -> Placement:
        """The place behind a response, for a turn that names no thread."""
        row = await self.row(response_id, tenant)
        assert row.branch_id is not None and row.stop is not None
        branch = self.ids.branch(partition_of(row.thread_id))
        return Placement(tenant, row.thread_id, None, row.branch_id, row.stop, row.stop, branch)

    async def session(self, key: str = "s", tenant: str = "") -> Placement:
        """The place of a session's next turn, as it is now."""
        thread_id = named_thread(tenant, key)
        branch = self.ids.branch(partition_of(thread_id))
        head = await self.thread(key, tenant)
        if head is None:
            root = self.ids.branch(partition_of(thread_id))
            return Placement(tenant, thread_id, key, root, 0, 0, branch, root, exclusive=True)
        seen = (head.active_branch, head.head)
        return Placement(
            tenant, thread_id, key, head.active_branch, head.head, head.head, branch, exclusive=True, seen=seen
        )

    # Turns.

    def new(self, placement: Placement, **facts: Any) -> NewResponse:
        id = self.ids.make("resp", partition_of(placement.thread_id))
        created = int(self.clock())
        new = NewResponse(id, None, "in_progress", "m", "echo", False, True, b'{"model":"m"}', None, b"[]", created)
        return replace(new, **facts)

    async def begin(self, placement: Placement, **facts: Any) -> str:
        new = self.new(placement, **facts)
        await self.database.submit(begin(new, placement, self.owner))
        return new.id

    async def journal(self, response_id: str, first: int, count: int = 1, owner: Owner | None = None) -> None:
        entry = Entry(first, count, b'["deltas"]')
        await self.database.submit(append_journal(response_id, owner or self.owner, "", entry))

    def ending(
        self, response_id: str, placement: Placement, input: Sequence[str], output: Sequence[str], **facts: Any
    ) -> Unit[None]:
        output_items = [self.item(text, "assistant") for text in output]
        ending = Ending("completed", self.items(*input), output_items, lingers=False)
        owner = facts.pop("owner", self.owner)
        return end(response_id, owner, placement, replace(ending, **facts))

    async def end(
        self, response_id: str, placement: Placement, input: Sequence[str], output: Sequence[str], **facts: Any
    ) -> None:
        await self.database.submit(self.ending(response_id, placement, input, output, **facts))

    async def turn(self, placement: Placement, said: str, answer: str, **facts: Any) -> str:
        """A whole turn: its response's id."""
        beginning = {"store": facts["store"]} if "store" in facts else {}
        response_id = await self.begin(placement, **beginning)
        await self.end(response_id, placement, [said], [answer], **facts)
        return response_id

    # Between workers.

    async def wait(self, thread_id: str | None = None, most: int = 100, tenant: str = "", **facts: Any) -> str:
        """Let a response wait in the queue: its id."""
        placement = Placement(tenant, thread_id or self.chain().thread_id, None, "", 0, 0, "")
        new = self.new(placement, **{"status": "queued", "background": True, "request": b"{}", **facts})
        await self.database.submit(enqueue(new, placement, most))
        return new.id

    async def claim(self, most: int = 10) -> list[StoredResponse]:
        """Claim what waits in the queue."""
        async with self.database.transaction() as connection:
            return await claim_queued(connection, self.owner, self.clock(), most)

    async def claim_left(self) -> list[StoredResponse]:
        """Claim what others have left behind."""
        async with self.database.transaction() as connection:
            return await claim_left_behind(connection, self.owner, self.clock())

    def as_owner(self, row: StoredResponse) -> Owner:
        """This worker, as the owner of what it has claimed."""
        return replace(self.owner, epoch=row.epoch)

    async def renew(self, response_id: str, until: float | None = None) -> None:
        """Keep the lease of a response for as long as a fresh one."""
        async with self.database.reading() as connection:
            [row] = await load(connection, [response_id])
        async with self.database.transaction() as connection:
            until = until or self.clock() + LEASE
            await renew_leases(connection, self.owner.name, {row.id: row.thread_id}, until)

    async def delete(self, response_id: str, tenant: str = "") -> bool:
        async with self.database.transaction() as connection:
            return await delete_response(connection, tenant, response_id, self.clock())

    # What is there.

    async def thread(self, key: str = "s", tenant: str = "") -> ThreadHead | None:
        async with self.database.reading() as connection:
            return await find_thread(connection, tenant, named_thread(tenant, key))

    async def find(self, response_id: str, tenant: str = "") -> StoredResponse | None:
        async with self.database.reading() as connection:
            return await find_response(connection, tenant, response_id, self.clock())

    async def row(self, response_id: str, tenant: str = "") -> StoredResponse:
        row = await self.find(response_id, tenant)
        assert row is not None, f"{response_id} is not stored"
        return row

    async def history(self, key: str = "s", tenant: str = "") -> list[str]:
        """The texts on the session's active branch."""
        head = await self.thread(key, tenant)
        assert head is not None, f"there is no thread {key}"
        return await self.read(head.active_branch, head.head)

    async def lineage(self, response_id: str, tenant: str = "") -> list[str]:
        """The texts that a turn after this response would build on."""
        row = await self.row(response_id, tenant)
        assert row.branch_id is not None and row.stop is not None
        return await self.read(row.branch_id, row.stop)

    async def read(self, branch: str, stop: int) -> list[str]:
        async with self.database.reading() as connection:
            return texts(await read_payloads(connection, branch, 0, stop))

    async def count(self, table: str) -> int:
        chosen: Table = metadata.tables[table]
        async with self.database.reading() as connection:
            return int((await connection.execute(select(func.count()).select_from(chosen))).scalar_one())


def texts(payloads: Sequence[bytes]) -> list[str]:
    return [orjson.loads(payload)["content"] for payload in payloads]


@asynccontextmanager
async def at_desk(url: str, clock: Clock | None = None, seed: int = 0) -> AsyncIterator[Desk]:
    """Open the database in the running loop, as a worker does."""
    clock = clock or Clock()
    database = Database(url, clock)
    try:
        yield Desk(database, clock, seed)
    finally:
        await database.close()
