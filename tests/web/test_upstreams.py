from hashlib import sha256

import pytest

from responses_ingress.web.callers import Keyring
from responses_ingress.web.upstreams import Upstreams, UpstreamStatus
from tests.web.asgi import opened_site

KEYS = Keyring((("ops", sha256(b"key-ops").digest()), ("a", sha256(b"key-a").digest())))
BARE = {
    "id": "echo",
    "object": "upstream",
    "kind": "echo",
    "health": "unknown",
    "in_flight": 0,
    "waiting": 0,
    "max_concurrent": None,
    "max_waiting": None,
    "last_success": None,
    "last_error": None,
    "tools": None,
    "completion_window": None,
}


def told(*statuses: UpstreamStatus) -> Upstreams:
    return Upstreams(lambda: statuses, Keyring())


async def test_all_upstreams_are_told_of(migrated_database: str) -> None:
    full = UpstreamStatus(
        name="slow",
        kind="background",
        in_flight=2,
        waiting=1,
        max_concurrent=2,
        max_waiting=7,
        last_success=10.5,
        last_error=("upstream_timeout", 11.5),
        tools="auto",
        without_tools=["m"],
        completion_window="24h",
    )
    async with opened_site(migrated_database, upstreams=told(UpstreamStatus("echo", "echo"), full)) as site:
        answer = await site.get("/v1/upstreams")
    assert answer.status == 200
    assert answer.json == {
        "object": "list",
        "data": [
            BARE,
            {
                "id": "slow",
                "object": "upstream",
                "kind": "background",
                "health": "failing",
                "in_flight": 2,
                "waiting": 1,
                "max_concurrent": 2,
                "max_waiting": 7,
                "last_success": 10,
                "last_error": {"code": "upstream_timeout", "at": 11},
                "tools": {"mode": "auto", "emulated_for": ["m"]},
                "completion_window": "24h",
            },
        ],
    }


@pytest.mark.parametrize(
    ("success", "error", "health"),
    [(None, None, "unknown"), (1, None, "ok"), (None, 1, "failing"), (1, 2, "failing"), (2, 1, "ok")],
)
async def test_the_last_turn_decides_on_the_health(
    migrated_database: str, success: float | None, error: float | None, health: str
) -> None:
    last = None if error is None else ("server_error", error)
    status = UpstreamStatus("a", "chat", last_success=success, last_error=last)
    async with opened_site(migrated_database, upstreams=told(status)) as site:
        assert [one["health"] for one in (await site.get("/v1/upstreams")).json["data"]] == [health]


async def test_only_admins_may_see_it_where_there_are_keys(migrated_database: str) -> None:
    async with opened_site(migrated_database, keys=KEYS, upstreams=Upstreams(tuple, KEYS, frozenset({"ops"}))) as site:
        assert (await site.get("/v1/upstreams")).status == 401
        refused = await site.get("/v1/upstreams", {"x-api-key": "key-a"})
        assert (refused.status, refused.error["code"]) == (403, "forbidden")
        assert (await site.get("/v1/upstreams", {"x-api-key": "key-ops"})).json == {"object": "list", "data": []}


async def test_without_admins_nobody_may_where_there_are_keys(migrated_database: str) -> None:
    async with opened_site(migrated_database, keys=KEYS) as site:
        assert (await site.get("/v1/upstreams", {"x-api-key": "key-ops"})).status == 403
