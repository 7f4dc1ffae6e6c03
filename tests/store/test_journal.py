"""Rows of the journal that would stand in the same place."""

from responses_ingress.store.responses import read_journal
from responses_ingress.store.turns import append_journal
from responses_ingress.store.values import Entry
from tests.store.desk import Desk


async def test_a_batch_without_events_gives_its_place_to_the_next(desk: Desk) -> None:
    """What is remembered makes no event; the batch behind it has the same number, and tells it too."""
    response_id = await desk.begin(desk.chain())
    for entry in (Entry(0, 2, b"[1]"), Entry(2, 0, b"[2]"), Entry(2, 3, b"[2,3]")):
        await desk.database.submit(append_journal(response_id, desk.owner, "", entry))
    async with desk.database.reading() as connection:
        assert await read_journal(connection, response_id) == [Entry(0, 2, b"[1]"), Entry(2, 3, b"[2,3]")]
