"""The routes of /v1/responses: each reads its request, asks the runner or the store, and replies.

What must stay true: nothing is decided here; another tenant's response is answered exactly as one that
does not exist.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from responses_ingress.core.deltas import Item
from responses_ingress.core.envelope import Envelope
from responses_ingress.core.items import listed
from responses_ingress.core.request import parse_request
from responses_ingress.errors import InvalidValue, NotFound
from responses_ingress.runs.run import Run
from responses_ingress.runs.runner import Runner
from responses_ingress.store.database import Database
from responses_ingress.store.responses import (
    StoredResponse,
    envelope_of,
    find_response,
    fold_journal,
    read_input,
    read_journal,
    read_output,
)
from responses_ingress.store.writer import RUNNING
from responses_ingress.web.callers import Keyring, read_caller
from responses_ingress.web.exchange import Exchange, read_json
from responses_ingress.web.replies import StreamOptions, reply_json, reply_stream

logger = logging.getLogger(__name__)

THREAD_HEADER = b"x-responses-ingress-thread"
_DEFAULT_PAGE, _MOST_PAGE = 20, 100
_MOST_DIGITS = 9


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """max_body: bytes of a body, packed and unpacked. strict: refuse unknown fields. extra: fields beyond
    the API's that some upstream is given."""

    max_body: int = 64 * 1024 * 1024
    max_items: int = 10_000
    strict: bool = False
    extra: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Responses:
    """The handlers and what they need."""

    runner: Runner
    database: Database
    keyring: Keyring
    limits: RequestLimits
    stream: StreamOptions

    async def create(self, exchange: Exchange) -> None:
        tenant, bearer = self.keyring.tenant(exchange.headers)
        body, raw = await read_json(exchange, self.limits.max_body)
        limits = self.limits
        request = parse_request(body, max_items=limits.max_items, strict=limits.strict, extra=limits.extra)
        caller = read_caller(exchange.headers, tenant, bearer, raw)
        run = await self.runner.create(request, caller, exchange.disconnected)
        if request.unknown:
            logger.info("%s: unknown fields %s", run.id, ", ".join(repr(name[:40]) for name in request.unknown[:10]))
        exchange.extra_headers.append((THREAD_HEADER, run.thread_id.encode()))
        if request.stream:
            await reply_stream(exchange, run, self.stream)
        elif request.background:
            await exchange.reply(run.response() if isinstance(run, Run) else await self._read(run.row))
        else:
            await reply_json(exchange, run)

    async def retrieve(self, exchange: Exchange) -> None:
        query = exchange.query()
        after = _after(query)
        row = await self._find(exchange)
        if query.get("stream", ["false"])[-1].lower() in ("true", "1"):
            run = await self.runner.follow(row, after)
            await reply_stream(exchange, run, self.stream, 0 if after is None else after + 1)
        else:
            response = await self._read(row)
            while (response["output"] or not row.running) and not await self.runner.seen(row):
                row = await self._find(exchange)
                response = await self._read(row)
            await exchange.reply(response)

    async def cancel(self, exchange: Exchange) -> None:
        tenant, _ = self.keyring.tenant(exchange.headers)
        response_id = exchange.path_params["response_id"]
        row = await self.runner.cancel(tenant, response_id)
        if row is None:
            raise _not_found(response_id)
        await exchange.reply(await self._read(row))

    async def delete(self, exchange: Exchange) -> None:
        tenant, _ = self.keyring.tenant(exchange.headers)
        response_id = exchange.path_params["response_id"]
        if not await self.runner.delete(tenant, response_id):
            raise _not_found(response_id)
        await exchange.reply({"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, exchange: Exchange) -> None:
        row = await self._find(exchange)
        page = _page_query(exchange.query())
        async with self.database.reading() as connection:
            items = await read_input(
                connection, row, after=page.after, most=page.limit + 1, newest_first=page.newest_first
            )
        await exchange.reply(_page(items, page.limit))

    async def _find(self, exchange: Exchange) -> StoredResponse:
        tenant, _ = self.keyring.tenant(exchange.headers)
        response_id = exchange.path_params["response_id"]
        async with self.database.reading() as connection:
            row = await find_response(connection, tenant, response_id, self.database.clock())
        if row is None:
            raise _not_found(response_id)
        return row

    async def _read(self, row: StoredResponse) -> Envelope:
        """The response as it is now: as this process sees it, as the journal tells it, or as it ended."""
        run = self.runner.get(row.id)
        if run is not None and run.status in RUNNING:  # its ending counts when it is committed
            return run.response()
        async with self.database.reading() as connection:
            entries = await read_journal(connection, row.id) if row.running else []
            if row.running and not entries:  # its end may have come in between
                row = await find_response(connection, row.tenant, row.id, self.database.clock()) or row
            output = [] if row.running or row.status == "cancelled" else await read_output(connection, row)
        if row.running:
            return (await fold_journal(row, entries)).response()
        return envelope_of(row) | {"output": output}


def _not_found(response_id: str) -> NotFound:
    return NotFound(f"Response with id '{response_id[:100]}' not found.")


def _after(query: Mapping[str, list[str]]) -> int | None:
    """`starting_after`: the number of the last event that was seen."""
    given = query.get("starting_after", [""])[-1]
    if not given:
        return None
    if not given.isdecimal() or len(given) > _MOST_DIGITS:
        raise InvalidValue("Invalid 'starting_after': expected a number of an event.", param="starting_after")
    return int(given)


@dataclass(frozen=True, slots=True)
class _PageQuery:
    after: str | None
    limit: int
    newest_first: bool


def _page_query(query: Mapping[str, list[str]]) -> _PageQuery:
    limit = query.get("limit", [str(_DEFAULT_PAGE)])[-1]
    if not limit.isdecimal() or len(limit) > _MOST_DIGITS or not 1 <= int(limit) <= _MOST_PAGE:
        raise InvalidValue(f"Invalid 'limit': expected an integer from 1 to {_MOST_PAGE}.", param="limit")
    order = query.get("order", ["desc"])[-1]
    if order not in ("asc", "desc"):
        raise InvalidValue("Invalid value for 'order': expected one of asc, desc.", param="order")
    return _PageQuery(query.get("after", [None])[-1], int(limit), order == "desc")


def _page(items: Sequence[Item], limit: int) -> dict[str, object]:
    """A page of `items`, of which there is one more where another page follows."""
    page = [listed(item) for item in items[:limit]]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
