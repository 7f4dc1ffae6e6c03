"""What holds after a crash, whichever process looks: what a client was shown is there, what it asks is answered,
and the database is sound.
"""

import asyncio
import time

from responses_ingress.store.verify import Finding, verify
from tests.crash.client import Json, Seen, post, resume
from tests.invariants import check_stream
from tests.stranger import stranger
from tests.upstream import Upstream

LEASE, FLUSH = 1.0, 0.05
SLACK = 0.25
"""Seconds that a commit may take on a busy machine, beyond the flush interval."""

RECOVERY = LEASE + 2
"""Seconds until what was left behind has ended; the lease, and some for a busy machine."""

FIELDS = {"model": "test-model", "input": "What is there?", "instructions": "Be brief."}
SESSION = {"session-id": "a session"}


async def pick_up(url: str, seen: Seen, asked: Json, headers: dict[str, str]) -> Seen:
    """Go on as a client does: from the last number seen; where there was none, by asking again."""
    if seen.id is None:
        again = await post(url, asked, headers)
        assert again.ended, again
        check_stream(again.events)
        return again
    rest = await resume(url, seen.id, seen.last)
    replayed = await resume(url, seen.id)
    whole = replayed.events
    assert whole, (rest, replayed)
    check_stream(whole)
    if seen.ended:
        assert rest.events == []
        assert seen.events == whole
    elif rest.events[0]["sequence_number"] == seen.last + 1:
        check_stream([*seen.events, *rest.events])
        assert [*seen.events, *rest.events] == whole
    else:  # what was seen last was not kept: the end has a lower number
        assert [event["type"] for event in rest.events] == ["response.failed"]
        assert rest.events[0]["sequence_number"] <= seen.last
    return Seen(whole, [time.monotonic()] * len(whole))


def check_shown(seen: Seen, response: Json, died: float) -> None:
    """All that was done, and all text that is older than the flush interval, is there."""
    assert response["status"] in ("completed", "failed", "cancelled")
    if response["status"] == "failed":
        assert response["error"]["code"] == "server_restarted"
    assert response["output"][: len(seen.items)] == seen.items
    text = "".join(part["text"] for item in response["output"] for part in item.get("content") or ())
    assert text.startswith(seen.text(died - FLUSH - SLACK))
    if seen.ended:
        assert response == seen.events[-1]["response"]


def check_history(upstream: Upstream, responses: list[Json]) -> None:
    """The last call was told what is committed, each item once, and nothing else."""
    told = [message for message in upstream.calls[-1].json["messages"] if message["role"] == "assistant"]
    expected = [
        item["content"][0]["text"]
        for response in responses
        if response["status"] == "completed"
        for item in response["output"]
        if item["type"] == "message"
    ]
    assert [message["content"] for message in told] == expected


async def settled(url: str) -> None:
    """Wait until all that was left behind has ended."""
    async with asyncio.timeout(RECOVERY):
        while unfinished(url):  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.02)


def unfinished(url: str) -> list[str]:
    """The responses that have not ended."""
    with stranger(url) as connection:
        rows = connection.rows("SELECT id FROM responses WHERE status IN ('queued', 'in_progress')")
    return [row["id"] for row in rows]


async def check_next_turn(url: str, headers: dict[str, str], previous: str | None) -> None:
    chain = {} if previous is None else {"previous_response_id": previous}
    after = await post(url, {**FIELDS, **chain}, headers)
    assert after.events[-1]["type"] == "response.completed"


async def check_database(url: str) -> None:
    assert unfinished(url) == []
    findings: list[Finding] = []
    await verify(url, LEASE, findings.append)
    assert findings == []
