"""Turns from request to end, as the runner takes them, but without a backend: a test says what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from responses_ingress.core.items import digest, text_of
from responses_ingress.core.request import Caller, Request, parse_request
from responses_ingress.runs.resolve import Resolved, resolve
from responses_ingress.store.history import read_payloads
from responses_ingress.store.turns import begin, end
from responses_ingress.store.values import Ending, NewItem, Placement
from tests.store.desk import Desk

Json = dict[str, Any]
Items = Sequence[Mapping[str, Any]]

TABLES = ("threads", "branches", "items", "responses", "journal", "preambles")


def user(text: str, **more: Any) -> Json:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}], **more}


def assistant(text: str) -> Json:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def thought(text: str = "") -> Json:
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}], "encrypted_content": text}


def call(id: str) -> Json:
    return {"type": "function_call", "call_id": id, "name": "ls", "arguments": "{}"}


def output(id: str) -> Json:
    return {"type": "function_call_output", "call_id": id, "output": f"output of {id}"}


def brief(items: Items) -> list[str]:
    """Items by their text, or by what they are."""
    return [text_of(item) or str(item.get("call_id") or item["type"]) for item in items]


@dataclass
class Play:
    """What a client asks at one desk, and what becomes of it."""

    desk: Desk

    async def resolve(self, body: Json, **caller: Any) -> tuple[Request, Resolved]:
        request = parse_request({"model": "m", **body})
        return request, await resolve(self.desk.database, self.desk.ids, request, Caller(**caller))

    async def means(self, *items: Json | str, **body: Any) -> Resolved:
        """What a request with these items means; the fields of `Caller` are given as `caller_...`."""
        caller = {name.removeprefix("caller_"): body.pop(name) for name in list(body) if name.startswith("caller_")}
        given = [user(item) if isinstance(item, str) else item for item in items]
        return (await self.resolve({"input": given, **body}, **caller))[1]

    async def begin(self, resolved: Resolved, previous: str | None = None, store: bool = True) -> str:
        placement = self.place(resolved)
        joined = b"[" + b",".join(item.payload for item in resolved.stored) + b"]"
        new = self.desk.new(placement, previous_response_id=previous, store=store, input=joined)
        await self.desk.database.submit(begin(new, placement, self.desk.owner))
        return new.id

    async def end(
        self, id: str, resolved: Resolved, *answer: Json | str, status: str = "completed", **facts: Any
    ) -> None:
        made = [self.made(assistant(item) if isinstance(item, str) else item) for item in answer]
        ending = Ending(status, resolved.stored, made if resolved.is_turn else [], lingers=False, **facts)
        await self.desk.database.submit(end(id, self.desk.owner, self.place(resolved), ending))

    async def turn(self, body: Json, *answer: Json | str, status: str = "completed", **facts: Any) -> str:
        """A whole turn; the fields of `Caller` are given as `caller_...`."""
        caller = {name.removeprefix("caller_"): facts.pop(name) for name in list(facts) if name.startswith("caller_")}
        request, resolved = await self.resolve(body, **caller)
        id = await self.begin(resolved, request.previous_response_id, request.store)
        await self.end(id, resolved, *answer, status=status, store=request.store, **facts)
        return id

    async def says(self, text: str, answer: str, **facts: Any) -> str:
        """A turn that sends nothing but its new message."""
        body: Json = {"input": text}
        body |= {name: facts.pop(name) for name in ("previous_response_id", "store") if name in facts}
        return await self.turn(body, answer, **facts)

    async def carries(self, items: Sequence[Json], *answer: Json | str, **facts: Any) -> str:
        """A turn as codex takes it: all of the history, and `store: false`."""
        return await self.turn({"input": list(items), "store": False}, *answer, **{"caller_thread_key": "s", **facts})

    async def history(self, key: str = "s", tenant: str = "") -> list[str]:
        head = await self.desk.thread(key, tenant)
        assert head is not None
        async with self.desk.database.reading() as connection:
            payloads = await read_payloads(connection, head.active_branch, 0, head.head)
        return brief([orjson.loads(payload) for payload in payloads])

    async def counts(self) -> dict[str, int]:
        return {table: await self.desk.count(table) for table in TABLES}

    def made(self, item: Json) -> NewItem:
        item = {**item, "id": self.desk.ids.item(item["type"], "0" * 16)}
        return NewItem(item["id"], item["type"], digest(item), orjson.dumps(item))

    @staticmethod
    def place(resolved: Resolved) -> Placement:
        assert resolved.placement is not None
        return resolved.placement
