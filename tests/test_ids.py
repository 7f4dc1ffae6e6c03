"""Ids: their form, what they carry, and that nothing but the injected clock and randomness decides them."""

import re
from random import Random

import pytest

from responses_ingress.ids import PREFIXES, Ids, named_thread, partition_of

NOW = 1_760_000_000
PARTITION = "0123456789abcdef"


def seeded(seed: int = 1) -> Ids:
    return Ids(lambda: NOW + 0.9, Random(seed).randbytes)


def test_an_id_is_a_prefix_the_partition_a_version_the_time_and_randomness() -> None:
    id = seeded().make("resp", PARTITION)
    match = re.fullmatch(r"resp_([0-9a-f]{16})(00)([0-9a-f]{8})([0-9a-f]{24})", id)
    assert match is not None
    assert match[1] == PARTITION
    assert int(match[3], 16) == NOW


def test_ids_follow_the_clock() -> None:
    now = [float(NOW)]
    ids = Ids(lambda: now[0], Random(1).randbytes)
    first = ids.make("resp", PARTITION)
    now[0] += 60
    second = ids.make("resp", PARTITION)
    assert int(second[23:31], 16) - int(first[23:31], 16) == 60


def test_the_same_clock_and_randomness_make_the_same_ids() -> None:
    def made(ids: Ids) -> list[str]:
        return [ids.partition(), ids.item("message", PARTITION), ids.branch(PARTITION), ids.call(), ids.request()]

    assert made(seeded()) == made(seeded())
    assert not set(made(seeded(1))) & set(made(seeded(2)))


def test_randomness_is_used_once_and_never_runs_short() -> None:
    ids = seeded()
    made = [id for _ in range(500) for id in (ids.make("x", PARTITION), ids.call(), ids.partition())]
    assert len(set(made)) == len(made)
    assert {len(id) for id in made} == {len("x_") + 50, len("call_") + 24, 16}
    tails = [id[-24:] for id in made if id.startswith("x_")]
    assert len(set(tails)) == len(tails)


def test_few_draws_serve_many_ids() -> None:
    draws: list[int] = []

    def random(size: int) -> bytes:
        draws.append(size)
        return Random(len(draws)).randbytes(size)

    ids = Ids(lambda: NOW, random)
    for _ in range(100):
        ids.make("msg", PARTITION)
    assert len(draws) == 1


@pytest.mark.parametrize(("type", "prefix"), [*PREFIXES.items(), ("something_new", "item"), ("", "item")])
def test_an_items_prefix_tells_its_type(type: str, prefix: str) -> None:
    assert seeded().item(type, PARTITION).startswith(f"{prefix}_{PARTITION}")


def test_no_two_item_types_share_a_prefix() -> None:
    assert len(set(PREFIXES.values())) == len(PREFIXES)


def test_every_id_made_in_a_thread_carries_its_partition() -> None:
    ids = seeded()
    thread = named_thread("tenant", "key")
    partition = partition_of(thread)
    assert len(partition) == 16
    for id in (ids.make("resp", partition), ids.item("message", partition), ids.item("of no known type", partition)):
        assert partition_of(id) == partition
    assert ids.branch(partition).startswith(partition)


@pytest.mark.parametrize(
    "id", ["", "msg_1", "resp_", "call_" + "0" * 24, "msg_" + "0" * 49, "msg_" + "0" * 51, "0" * 28]
)
def test_an_id_that_is_not_ours_carries_no_partition(id: str) -> None:
    assert partition_of(id) == ""


def test_a_named_thread_is_the_same_for_the_same_tenant_and_key_only() -> None:
    pairs = [("", "a"), ("a", ""), ("a", "b"), ("b", "a"), ("ab", ""), ("", "ab"), ("", "A"), ("", "ä")]
    made = [named_thread(tenant, key) for tenant, key in pairs]
    assert made == [named_thread(tenant, key) for tenant, key in pairs]
    assert len(set(made)) == len(pairs)
    for id in made:
        assert re.fullmatch(r"thread_[0-9a-f]{16}01[0-9a-f]{32}", id)


def test_a_named_thread_is_told_from_a_fresh_one_by_its_version() -> None:
    ids = seeded()
    assert named_thread("", "a")[23:25] != ids.make("thread", ids.partition())[23:25]


def test_a_call_and_a_request_are_named_by_randomness_alone() -> None:
    ids = seeded()
    assert re.fullmatch(r"call_[0-9a-f]{24}", ids.call())
    assert re.fullmatch(r"req_[0-9a-f]{32}", ids.request())
