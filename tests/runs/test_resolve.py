"""What a request means: every rule of "What a request means" in docs/architecture.md, over a real store."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from responses_ingress.core.items import digest
from responses_ingress.errors import (
    NotFound,
    PlacementOutdated,
    PreviousNotCompleted,
    PreviousNotFound,
    ResponseRunning,
    ThreadBusy,
)
from responses_ingress.ids import named_thread, partition_of
from responses_ingress.store.history import read_payloads
from responses_ingress.store.retention import delete_expired
from responses_ingress.store.tables import branches
from tests.runs.play import Json, Play, assistant, brief, call, output, thought, user
from tests.store.desk import at_desk


@pytest.fixture
async def play(each_database: str) -> AsyncIterator[Play]:
    async with at_desk(each_database) as desk:
        yield Play(desk)


# Nothing is named.


async def test_a_request_that_names_nothing_has_a_thread_of_its_own_and_no_context(play: Play) -> None:
    first, second = await play.means("a"), await play.means("a")
    assert first.thread_id != second.thread_id
    assert (brief(first.context), brief(first.new)) == ([], ["a"])
    placement = play.place(first)
    assert (placement.position, placement.first, placement.exclusive, placement.thread_key) == (0, 0, False, None)


async def test_new_items_get_ids_of_their_thread_and_keep_those_they_have(play: Play) -> None:
    resolved = await play.means("a", user("b", id="mine"), user("c", id=None), output("c1"))
    ids = [item["id"] for item in resolved.new]
    partition = partition_of(resolved.thread_id)
    assert ids[1] == "mine"
    assert [id.split("_")[0] for id in ids if id != "mine"] == ["msg", "msg", "fco"]
    assert {partition_of(id) for id in ids if id != "mine"} == {partition}


async def test_what_is_stored_of_an_item_is_what_was_sent_and_its_id(play: Play) -> None:
    odd = user("a", status=None, unheard_of={"x": [1.0, None]})
    resolved = await play.means(odd)
    (stored,) = resolved.stored
    assert orjson.loads(stored.payload) == {**odd, "id": stored.item_id} == resolved.new[0]
    assert (stored.type, stored.digest) == ("message", digest(odd))


async def test_what_is_neither_stored_nor_in_a_session_is_written_nowhere(play: Play) -> None:
    resolved = await play.means("a", store=False)
    assert (resolved.placement, list(resolved.stored), brief(resolved.context)) == (None, [], [])
    assert resolved.new == [user("a")]


async def test_a_cache_key_names_no_thread(play: Play) -> None:
    threads = {(await play.means("a", prompt_cache_key="k")).thread_id for _ in range(2)}
    assert len(threads) == 2
    assert named_thread("", "k") not in threads


async def test_finding_out_what_a_request_means_writes_nothing(play: Play) -> None:
    root = await play.says("a", "1")
    await play.says("b", "2", caller_thread_key="s")
    before = await play.counts()
    await play.means("x")
    await play.means("x", previous_response_id=root)
    await play.means("x", caller_thread_key="s")
    await play.means("y", store=False, caller_thread_key="s", caller_forked_from="t")
    await play.means("x", caller_thread_key="new")
    assert await play.counts() == before


# After a response.


async def test_after_a_response_its_history_comes_before_the_input(play: Play) -> None:
    first = await play.says("a", "1")
    second = await play.says("b", "2", previous_response_id=first)
    resolved = await play.means("c", previous_response_id=second)
    assert (brief(resolved.context), brief(resolved.new)) == (["a", "1", "b", "2"], ["c"])
    placement = play.place(resolved)
    assert (placement.position, placement.first, placement.exclusive) == (4, 4, False)
    assert partition_of(first) == partition_of(second) == partition_of(resolved.thread_id)


async def test_after_an_earlier_response_what_came_later_is_not_context(play: Play) -> None:
    first = await play.says("a", "1")
    await play.says("b", "2", previous_response_id=first)
    other = await play.says("c", "3", previous_response_id=first)
    assert brief((await play.means("d", previous_response_id=other)).context) == ["a", "1", "c", "3"]
    assert brief((await play.means("d", previous_response_id=first)).context) == ["a", "1"]


async def test_context_comes_as_it_was_stored(play: Play) -> None:
    odd = user("a", id="mine", status=None, unheard_of={"x": [1.0, None]})
    first = await play.turn({"input": [odd]}, thought("hm"), "1")
    context = (await play.means("b", previous_response_id=first)).context
    assert context[0] == odd
    assert {**context[1], "id": None} == {**thought("hm"), "id": None}


@pytest.mark.parametrize("gone", ["unknown", "another tenant's", "deleted", "not stored", "of no thread"])
async def test_a_response_that_cannot_be_found_is_answered_alike_whatever_the_reason(play: Play, gone: str) -> None:
    id = "resp_unknown"
    if gone == "another tenant's":
        id = await play.says("a", "1", caller_tenant="you")
    elif gone == "deleted":
        id = await play.says("a", "1")
        await play.desk.delete(id)
    elif gone == "not stored":
        id = await play.says("a", "1", store=False, caller_thread_key="s")
    elif gone == "of no thread":
        id = "resp_" + "0" * 50
    with pytest.raises(PreviousNotFound) as caught:
        await play.means("b", previous_response_id=id)
    assert caught.value.body()["error"] == {
        "message": f"Previous response with id '{id}' not found.",
        "type": "invalid_request_error",
        "param": "previous_response_id",
        "code": "previous_response_not_found",
    }


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_response_that_failed_cannot_be_built_on(play: Play, status: str) -> None:
    failed = await play.says("a", "half", status=status)
    with pytest.raises(PreviousNotCompleted) as caught:
        await play.means("b", previous_response_id=failed)
    assert (caught.value.status, caught.value.param) == (400, "previous_response_id")
    assert status in caught.value.message


async def test_an_incomplete_response_can_be_built_on(play: Play) -> None:
    incomplete = await play.says("a", "half", status="incomplete")
    assert brief((await play.means("b", previous_response_id=incomplete)).context) == ["a", "half"]


async def test_a_response_that_runs_still_is_waited_for(play: Play) -> None:
    resolved = await play.means("a")
    running = await play.begin(resolved)
    with pytest.raises(ResponseRunning) as caught:
        await play.means("b", previous_response_id=running)
    assert caught.value.running == running
    assert not isinstance(caught.value, ThreadBusy)
    await play.end(running, resolved, "1")
    assert brief((await play.means("b", previous_response_id=running)).context) == ["a", "1"]


async def test_a_response_deleted_meanwhile_cannot_be_built_on(play: Play) -> None:
    first = await play.says("a", "1")
    resolved = await play.means("b", previous_response_id=first)
    await play.desk.delete(first)
    with pytest.raises(PlacementOutdated):
        await play.begin(resolved, first)


async def test_an_unstored_request_after_a_response_reads_its_history_and_writes_nothing(play: Play) -> None:
    first = await play.says("a", "1")
    resolved = await play.means("b", previous_response_id=first, store=False)
    assert (brief(resolved.context), brief(resolved.new), resolved.placement) == (["a", "1"], ["b"], None)


async def test_instructions_are_not_inherited(play: Play) -> None:
    first = await play.turn({"input": "a", "instructions": "be nice"}, "1")
    request, resolved = await play.resolve({"input": "b", "previous_response_id": first})
    assert request.instructions is None
    assert brief([*resolved.context, *resolved.new]) == ["a", "1", "b"]


# In a session, after a response.


async def test_a_session_goes_on_after_its_own_last_response(play: Play) -> None:
    first = await play.says("a", "1", caller_thread_key="s")
    await play.says("b", "2", caller_thread_key="s", previous_response_id=first)
    assert await play.history() == ["a", "1", "b", "2"]
    assert (await play.counts())["branches"] == 1


async def test_a_session_that_goes_back_to_an_earlier_response_has_a_branch_from_there(play: Play) -> None:
    first = await play.says("a", "1", caller_thread_key="s")
    await play.says("b", "2", caller_thread_key="s")
    resolved = await play.means("c", previous_response_id=first, caller_thread_key="s")
    assert brief(resolved.context) == ["a", "1"]
    placement = play.place(resolved)
    assert (placement.position, placement.first, placement.exclusive) == (2, 2, True)
    await play.says("c", "3", caller_thread_key="s", previous_response_id=first)
    assert await play.history() == ["a", "1", "c", "3"]
    assert (await play.counts())["items"] == 6


@pytest.mark.parametrize("existing", [False, True], ids=["a new session", "a session under way"])
async def test_a_session_may_go_on_from_another_threads_response(play: Play, existing: bool) -> None:
    elsewhere = await play.says("x", "X")
    if existing:
        await play.says("a", "1", caller_thread_key="s")
    resolved = await play.means("y", previous_response_id=elsewhere, caller_thread_key="s")
    assert (resolved.thread_id, brief(resolved.context)) == (named_thread("", "s"), ["x", "X"])
    await play.says("y", "Y", caller_thread_key="s", previous_response_id=elsewhere)
    await play.says("z", "Z", caller_thread_key="s")
    assert await play.history() == ["x", "X", "y", "Y", "z", "Z"]
    assert brief((await play.means("y", previous_response_id=elsewhere)).context) == ["x", "X"]


# In a session whose client does not carry its history.


async def test_a_session_remembers_what_its_client_does_not_send(play: Play) -> None:
    resolved = await play.means("a", caller_thread_key="s")
    assert (resolved.thread_id, brief(resolved.context)) == (named_thread("", "s"), [])
    await play.says("a", "1", caller_thread_key="s")
    await play.turn({"input": [user("b")]}, thought("hm"), call("c1"), caller_thread_key="s")
    resolved = await play.means(output("c1"), "c", caller_thread_key="s")
    assert brief(resolved.context) == ["a", "1", "b", "reasoning", "c1"]
    assert brief(resolved.new) == ["output of c1", "c"]
    placement = play.place(resolved)
    assert (placement.position, placement.first, placement.exclusive) == (5, 5, True)


async def test_sessions_are_their_tenants_own(play: Play) -> None:
    await play.says("mine", "1", caller_thread_key="s", caller_tenant="me")
    resolved = await play.means("b", caller_thread_key="s", caller_tenant="you")
    assert list(resolved.context) == []
    assert resolved.thread_id != named_thread("me", "s")


async def test_the_turn_that_runs_in_a_session_is_for_the_store_to_see(play: Play) -> None:
    running = await play.means("a", caller_thread_key="s")
    await play.begin(running)
    resolved = await play.means("b", caller_thread_key="s")
    assert list(resolved.context) == []
    with pytest.raises(ThreadBusy):
        await play.begin(resolved)


async def test_what_a_backend_remembered_of_the_session_comes_with_its_next_turn(play: Play) -> None:
    await play.says("a", "1", caller_thread_key="s", memory=b'{"id":"up_1"}')
    assert (await play.means("b", caller_thread_key="s")).memory == b'{"id":"up_1"}'
    assert (await play.means("b", store=False, caller_thread_key="s")).memory == b'{"id":"up_1"}'
    assert (await play.means("b", caller_thread_key="another")).memory is None
    assert (await play.means("b")).memory is None


async def test_what_a_backend_remembered_of_a_response_comes_with_each_turn_that_builds_on_it(play: Play) -> None:
    first = await play.says("a", "1", memory=b'{"id":"up_1"}')
    second = await play.says("b", "2", previous_response_id=first, memory=b'{"id":"up_2"}')
    silent = await play.says("c", "3", previous_response_id=second)
    for caller in ({}, {"caller_thread_key": "s"}, {"store": False}):
        found = [
            (await play.means("d", previous_response_id=id, **caller)).memory for id in (first, second, silent, first)
        ]
        assert found == [b'{"id":"up_1"}', b'{"id":"up_2"}', None, b'{"id":"up_1"}']


# In a session whose client carries its history.

TURN = [user("a"), thought("hm"), call("c1")]


async def test_a_carried_history_is_the_context_and_only_its_end_is_stored(play: Play) -> None:
    await play.carries([user("a")], thought("hm"), call("c1"))
    sent = [user("a"), thought("hm"), call("c1"), output("c1")]
    resolved = await play.means(*sent, store=False, caller_thread_key="s")
    assert brief([*resolved.context, *resolved.new]) == brief(sent)
    assert [item.type for item in resolved.stored] == ["function_call_output"]
    placement = play.place(resolved)
    assert (placement.position, placement.first, placement.exclusive) == (3, 0, True)


async def test_a_turn_of_many_requests_is_stored_once_whatever_its_client_drops(play: Play) -> None:
    answers: list[list[Json]] = [[thought("p"), call("c1")], [thought("q"), call("c2")], [assistant("done")]]
    sent = [user("a")]
    for number, answer in enumerate(answers):
        await play.carries(sent, *answer)
        sent += [item for item in answer if item["type"] != "reasoning"] + [output(f"c{number + 1}")]
    assert await play.history() == ["a", "reasoning", "c1", "output of c1", "reasoning", "c2", "output of c2", "done"]
    assert (await play.counts())["branches"] == 1
    assert (await play.counts())["responses"] == 0


async def test_a_model_made_item_tells_that_history_is_carried_also_where_it_is_stored(play: Play) -> None:
    await play.says("a", "1", caller_thread_key="s")
    resolved = await play.means("a", assistant("1"), "b", caller_thread_key="s")
    assert (brief(resolved.context), brief(resolved.new)) == (["a", "1"], ["b"])
    assert play.place(resolved).position == 2


async def test_context_is_what_was_sent_and_not_what_was_stored(play: Play) -> None:
    await play.carries([user("a")], thought("hm"), "1")
    resent = {**assistant("1"), "unheard_of": True}
    resolved = await play.means("a", resent, "b", store=False, caller_thread_key="s")
    assert resolved.context == [user("a"), resent]


async def test_a_real_repeat_is_stored_again(play: Play) -> None:
    await play.carries([user("again")], "again")
    await play.carries([user("again"), assistant("again"), user("again")], "again")
    assert await play.history() == ["again"] * 4


async def test_a_compacted_history_begins_a_new_branch(play: Play) -> None:
    await play.carries([user("a")], "1")
    await play.carries([user("a"), assistant("1"), user("b")], "2")
    summary = {"type": "compaction", "encrypted_content": "all that was"}
    resolved = await play.means(summary, "c", store=False, caller_thread_key="s")
    assert (brief(resolved.context), play.place(resolved).position) == ([], 0)
    await play.carries([summary, user("c")], "3")
    await play.carries([summary, user("c"), assistant("3"), user("d")], "4")
    assert await play.history() == ["compaction", "c", "3", "d", "4"]
    assert await play.counts() | {"threads": 1, "branches": 2, "items": 4 + 5} == await play.counts()


async def test_an_edited_history_branches_off_before_the_edit(play: Play) -> None:
    await play.carries([user("a")], "1")
    await play.carries([user("a"), assistant("1"), user("b")], "2")
    resolved = await play.means("a", assistant("1"), "b, but better", store=False, caller_thread_key="s")
    assert (brief(resolved.context), brief(resolved.new)) == (["a", "1"], ["b, but better"])
    await play.carries([user("a"), assistant("1"), user("b, but better")], "3")
    assert await play.history() == ["a", "1", "b, but better", "3"]
    assert (await play.counts())["items"] == 6


async def test_a_history_may_be_rolled_back_further_than_where_its_branch_began(play: Play) -> None:
    await play.carries([user("a")], "1")
    await play.carries([user("a"), assistant("1"), user("b")], "2")
    await play.carries([user("a"), assistant("1"), user("c")], "3")
    await play.carries([user("a"), user("d")], "4")
    assert await play.history() == ["a", "d", "4"]
    await play.carries([user("a"), user("d"), assistant("4"), user("e")], "5")
    assert await play.history() == ["a", "d", "4", "e", "5"]


@pytest.mark.parametrize("shared", [0, 2, 3], ids=["all of it", "its second turn", "its second answer"])
async def test_a_session_rewritten_again_and_again_keeps_a_short_line(play: Play, shared: int) -> None:
    await play.carries([user("a")], "1")
    await play.carries([user("a"), assistant("1"), user("b")], "2")
    beginning = [user("a"), assistant("1"), user("b")][:shared]
    for number in range(50):
        sent = [*beginning, assistant(f"so {number}"), user("go on")]
        await play.turn({"input": sent}, f"{number}!", caller_thread_key="s")
        assert await play.history() == [*brief(beginning), f"so {number}", "go on", f"{number}!"]
        assert await length_of_line(play) <= 2
    await play.turn({"input": [*sent, assistant("49!"), user("c")]}, "3", caller_thread_key="s")
    play.desk.clock.now += 40 * 86_400
    async with play.desk.database.transaction() as connection:
        assert await delete_expired(connection, play.desk.clock()) == 51
    assert await play.history() == [*brief(beginning), "so 49", "go on", "49!", "c", "3"]
    assert (await play.counts())["branches"] == (2 if beginning else 1)


async def length_of_line(play: Play) -> int:
    """How many branches the session's history lies on, or passes."""
    head = await play.desk.thread()
    assert head is not None
    async with play.desk.database.reading() as connection:
        rows = await connection.execute(select(branches.c.id, branches.c.parent_branch))
    parents = {row.id: row.parent_branch for row in rows}
    line = [head.active_branch]
    while (parent := parents[line[-1]]) is not None:
        line.append(parent)
    return len(line)


async def test_a_request_sent_again_after_its_answer_was_lost_is_not_doubled(play: Play) -> None:
    await play.carries([user("a")], "lost on the way")
    resolved = await play.means("a", store=False, caller_thread_key="s")
    assert (brief(resolved.context), brief(resolved.new), list(resolved.stored)) == (["a"], [], [])
    await play.carries([user("a")], "1")
    assert await play.history() == ["a", "1"]


async def test_a_request_sent_again_after_it_failed_is_as_the_first_time(play: Play) -> None:
    await play.carries([user("a")], "1")
    sent = [user("a"), assistant("1"), user("b")]
    await play.carries(sent, "half", status="failed")
    resolved = await play.means(*sent, store=False, caller_thread_key="s")
    assert brief(resolved.new) == ["b"]
    await play.carries(sent, "2")
    assert await play.history() == ["a", "1", "b", "2"]


# A thread made from another one.


async def test_a_forked_thread_begins_on_the_branch_of_its_parent(play: Play) -> None:
    await play.carries([user("a")], "1", caller_thread_key="parent")
    sent = [user("a"), assistant("1"), user("b")]
    await play.carries(sent, "2", caller_thread_key="child", caller_forked_from="parent")
    assert await play.history("child") == ["a", "1", "b", "2"]
    assert await play.history("parent") == ["a", "1"]
    assert (await play.counts())["items"] == 4
    await play.carries([user("a"), assistant("1"), user("c")], "3", caller_thread_key="parent")
    await play.carries([*sent, assistant("2"), user("d")], "4", caller_thread_key="child", caller_forked_from="parent")
    assert await play.history("child") == ["a", "1", "b", "2", "d", "4"]
    assert await play.history("parent") == ["a", "1", "c", "3"]
    assert (await play.counts())["items"] == 8


async def test_a_thread_forked_in_the_middle_shares_what_comes_before(play: Play) -> None:
    await play.carries([user("a")], "1", caller_thread_key="parent")
    await play.carries([user("a"), assistant("1"), user("b")], "2", caller_thread_key="parent")
    fork = {"caller_thread_key": "child", "caller_forked_from": "parent"}
    resolved = await play.means("a", assistant("1"), "c", store=False, **fork)
    assert brief(resolved.context) == ["a", "1"]
    await play.carries([user("a"), assistant("1"), user("c")], "3", **fork)
    assert await play.history("child") == ["a", "1", "c", "3"]
    assert (await play.counts())["items"] == 6


@pytest.mark.parametrize("parent", ["unknown", "another's", "the same", "of another history"])
async def test_a_fork_that_shares_nothing_begins_at_the_beginning(play: Play, parent: str) -> None:
    await play.carries([user("theirs")], "1", caller_thread_key="another's", caller_tenant="you")
    await play.carries([user("x")], "X", caller_thread_key="of another history")
    key = "the same" if parent == "the same" else "child"
    await play.carries([user("a"), assistant("0"), user("b")], "1", caller_thread_key=key, caller_forked_from=parent)
    await play.carries([user("a"), assistant("0"), user("b"), assistant("1"), user("c")], "2", caller_thread_key=key)
    assert await play.history(key) == ["a", "0", "b", "1", "c", "2"]
    assert await play.history("of another history") == ["x", "X"]
    assert (await play.counts())["branches"] == 3


# Requests that are no turns.


@pytest.mark.parametrize("kind", ["prewarm", "memory", "compaction"])
async def test_a_request_that_is_no_turn_leaves_the_session_alone(play: Play, kind: str) -> None:
    await play.carries([user("a")], "1")
    before = await play.desk.thread()
    sent = [user("a"), assistant("1"), user("summarize")]
    resolved = await play.means(*sent, store=False, caller_thread_key="s", caller_kind=kind)
    assert resolved.placement is None
    assert resolved.thread_id != named_thread("", "s")
    assert brief([*resolved.context, *resolved.new]) == brief(sent)
    await play.says("stored", "x", caller_thread_key="s", caller_kind=kind)
    assert await play.desk.thread() == before
    assert await play.history() == ["a", "1"]


@pytest.mark.parametrize("kind", ["prewarm", "memory", "compaction"])
async def test_a_request_that_is_no_turn_may_follow_a_response_outside_the_session(play: Play, kind: str) -> None:
    first = await play.says("a", "1", caller_thread_key="s")
    resolved = await play.means("b", previous_response_id=first, caller_thread_key="s", caller_kind=kind)
    assert brief(resolved.context) == ["a", "1"]
    assert not play.place(resolved).exclusive
    await play.says("b", "2", previous_response_id=first, caller_thread_key="s", caller_kind=kind)


async def test_a_compaction_in_the_middle_of_a_turn_keeps_the_outputs_it_is_first_to_bring(play: Play) -> None:
    await play.carries([user("a")], call("c1"), call("c2"))
    sent = [user("a"), call("c1"), call("c2"), output("c1"), output("c2"), user("summarize")]
    resolved = await play.means(*sent, store=False, caller_thread_key="s", caller_kind="compaction")
    assert brief([*resolved.context, *resolved.new]) == brief(sent)
    assert [item.type for item in resolved.stored] == ["function_call_output"] * 2
    assert not resolved.is_turn
    await play.carries(sent, "a summary", caller_kind="compaction")
    assert await play.history() == ["a", "c1", "c2", "output of c1", "output of c2"]


# References and conversations.


async def test_a_reference_is_replaced_by_the_item_in_its_place(play: Play) -> None:
    odd = user("a", id="mine", unheard_of=[1])
    await play.turn({"input": [odd]}, "1")
    resolved = await play.means("before", {"type": "item_reference", "id": "mine"}, {"id": "mine"}, "after")
    assert brief(resolved.new) == ["before", "a", "a", "after"]
    assert resolved.new[1] == resolved.new[2] == odd


async def test_a_reference_works_in_a_session_as_the_item_would(play: Play) -> None:
    await play.carries([user("a")], "1")
    async with play.desk.database.reading() as connection:
        head = await play.desk.thread()
        assert head is not None
        stored = [orjson.loads(p) for p in await read_payloads(connection, head.active_branch, 0, head.head)]
    references = [{"type": "item_reference", "id": item["id"]} for item in stored]
    resolved = await play.means(*references, "b", store=False, caller_thread_key="s")
    assert (resolved.context, brief(resolved.new)) == (stored, ["b"])


@pytest.mark.parametrize("whose", ["nobody's", "another tenant's"])
async def test_a_reference_to_what_is_not_there_is_not_found(play: Play, whose: str) -> None:
    await play.turn({"input": [user("a", id="mine")]}, "1")
    await play.turn({"input": [user("a", id="another tenant's")]}, "1", caller_tenant="you")
    with pytest.raises(NotFound) as caught:
        await play.means({"id": "mine"}, {"id": whose})
    assert caught.value.body()["error"] == {
        "message": f"Item with id '{whose}' not found.",
        "type": "invalid_request_error",
        "param": "input",
        "code": None,
    }


@pytest.mark.parametrize("key", [None, "s"])
async def test_a_conversation_is_not_found(play: Play, key: str | None) -> None:
    with pytest.raises(NotFound) as caught:
        await play.means("a", conversation="conv_1", caller_thread_key=key)
    error = caught.value
    assert (error.status, error.code) == (404, None)
    assert "'conv_1'" in error.message


# Any client, over many turns.

texts = st.sampled_from("ab")  # so that real repeats are common
rewrites = st.sampled_from(["go on", "drop thoughts", "edit", "roll back", "compact", "repeat"])
steps = st.lists(
    st.tuples(rewrites, texts, st.integers(0, 10), st.sampled_from(["completed", "failed", "incomplete"])),
    min_size=1,
    max_size=8,
)


def rewritten(history: list[Json], rewrite: str, text: str, at: int) -> list[Json]:
    """What a client sends next, when this is what it knows."""
    if rewrite == "compact":
        return [{"type": "compaction", "encrypted_content": text}, user(text)]
    if rewrite == "repeat":
        return history[:-1] or [user(text)]
    if rewrite == "drop thoughts":
        history = [item for item in history if item["type"] != "reasoning"]
    if rewrite in ("edit", "roll back"):
        history = history[: at % (len(history) + 1)]
    if rewrite == "edit":
        history = [*history, user("edited")]
    return [*history, user(text)]


@given(steps)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_session_holds_what_its_client_means_whatever_it_rewrites(
    copy_of_database: Callable[[], str], steps: list[tuple[str, str, int, str]]
) -> None:
    """Nothing is doubled, nothing is lost: but for thoughts, which a client may drop and a session keeps."""

    def firm(items: Sequence[Mapping[str, Any]]) -> list[str]:
        return [digest(dict(item)).hex() for item in items if item["type"] != "reasoning"]

    async def turns() -> None:
        async with at_desk(copy_of_database()) as desk:
            play, known, kept = Play(desk), list[Json](), list[str]()
            for rewrite, text, at, status in steps:
                sent = rewritten(known, rewrite, text, at)
                answer = [thought(text), assistant(text)]
                await play.carries(sent, *answer, status=status)
                if status != "failed":
                    known = [*sent, *answer]
                    kept = firm(known)
                head = await desk.thread()
                assert head is not None
                async with desk.database.reading() as connection:
                    payloads = await read_payloads(connection, head.active_branch, 0, head.head)
                assert firm([orjson.loads(payload) for payload in payloads]) == kept

    asyncio.run(turns())
