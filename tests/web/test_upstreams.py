from hashlib import sha256

import pytest

from responses_ingress.web.callers import Keyring
from responses_ingress.web.upstreams import UpstreamStatus
from tests.web.asgi import ADMIN, Site, opened_site

KEYS = Keyring(((ADMIN, sha256(b"key-ops").digest()), ("a", sha256(b"key-a").digest())))
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
FULL = UpstreamStatus(
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


async def test_all_upstreams_are_told_of(site: Site) -> None:
    site.upstreams += [UpstreamStatus("echo", "echo"), FULL]
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
    site: Site, success: float | None, error: float | None, health: str
) -> None:
    last = None if error is None else ("server_error", error)
    site.upstreams.append(UpstreamStatus("a", "chat", last_success=success, last_error=last))
    assert [one["health"] for one in (await site.get("/v1/upstreams")).json["data"]] == [health]


async def test_only_admins_may_see_it_where_there_are_keys(migrated_database: str) -> None:
    async with opened_site(migrated_database, keys=KEYS) as site:
        assert (await site.get("/v1/upstreams")).status == 401
        refused = await site.get("/v1/upstreams", {"x-api-key": "key-a"})
        assert (refused.status, refused.error["code"]) == (403, "forbidden")
        assert (await site.get("/v1/upstreams", {"x-api-key": "key-ops"})).json == {"object": "list", "data": []}
