"""The crash contract: the server is killed at each named point of a run's life, comes back, and nothing that
a client was shown is lost, nothing stays stuck, and nothing is asked or kept twice.
"""

import time

import orjson
import pytest

from tests.crash.client import Json, get, post, resume
from tests.crash.contract import (
    FIELDS,
    RECOVERY,
    SESSION,
    check_database,
    check_history,
    check_next_turn,
    check_shown,
    pick_up,
    settled,
)
from tests.crash.server import MortalServer
from tests.invariants import check_stream
from tests.stranger import stranger
from tests.upstream import Upstream
from tests.wire import Wire, parse_events

POINTS = [
    ("begin.before", 1),
    ("begin.after", 1),
    ("journal.before", 1),
    ("journal.before", 2),
    ("journal.after", 2),
    ("publish.before", 4),
    ("publish.after", 1),
    ("publish.after", 4),
    ("INSERT INTO responses", 1),
    ("INSERT INTO journal", 2),
    ("end.before", 1),
    ("INSERT INTO items", 1),
    ("UPDATE branches", 1),
    ("UPDATE responses SET branch_id", 1),
    ("end.after", 1),
]


CASES = [
    (point, count, background, session)
    for at, (point, count) in enumerate(POINTS)
    for background, session in ((False, bool(at % 2)), (True, not at % 2))
]


@pytest.mark.parametrize(("point", "count", "background", "session"), CASES, ids=str)
async def test_killed_at(
    server: MortalServer, upstream: Upstream, point: str, count: int, background: bool, session: bool
) -> None:
    headers = SESSION if session else {}
    once = {**headers, "idempotency-key": "once"}
    first = await post(server.url, FIELDS, headers)
    assert first.ended
    chain: Json = {} if session else {"previous_response_id": first.id}
    server.arm(point, count)
    asked = {**FIELDS, **chain, "background": background}
    seen = await post(server.url, asked, once)
    await server.died()
    died = time.monotonic()
    assert seen.lost

    await server.start()
    restarted = time.monotonic()
    whole = await pick_up(server.url, seen, asked, once)
    assert time.monotonic() - restarted < RECOVERY
    assert whole.id is not None
    response = await get(server.url, whole.id)
    check_shown(seen, response, died)
    # Asked again where nobody had seen any of it, by the server (background) or by the client.
    assert len(upstream.calls) <= 2 + (seen.items == [] and (background or seen.id is None))
    previous = None if session else whole.id if response["status"] == "completed" else first.id
    await check_next_turn(server.url, headers, previous)
    check_history(upstream, [first.events[-1]["response"], response])
    await check_database(server.database)


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
async def test_killed_while_it_cancels(server: MortalServer, upstream: Upstream, background: bool) -> None:
    """A foreground response by leaving it, a background one by its own request; that one stays asked for."""
    first = await post(server.url, FIELDS, SESSION)
    server.arm("cancel")
    async with Wire(server.url) as wire:
        asked = orjson.dumps({**FIELDS, "stream": True, "background": background})
        await wire.start("POST", "/v1/responses", asked, SESSION)
        body = await wire.read_until(b"response.output_text.delta")
        if background:
            response_id = parse_events(body[: body.rfind(b"\n\n") + 2])[0]["response"]["id"]
            async with Wire(server.url) as other:
                await other.start("POST", f"/v1/responses/{response_id}/cancel")
                await server.died()
    await server.died()

    await server.start()
    await settled(server.database)
    with stranger(server.database) as connection:
        (row,) = connection.rows("SELECT id, status FROM responses WHERE id != ?", first.id)
    assert row["status"] == ("cancelled" if background else "failed")
    events = (await resume(server.url, row["id"])).events
    check_stream(events)
    assert events[-1]["response"]["status"] == row["status"]
    await check_next_turn(server.url, SESSION, None)
    check_history(upstream, [first.events[-1]["response"]])
    assert len(upstream.calls) == 3
    await check_database(server.database)
