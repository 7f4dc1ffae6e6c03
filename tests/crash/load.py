"""Clients that go on whatever happens, and say what of it should not have: for hundreds of kills under load.

A conversation asks one turn after another, in a session or as a chain of responses. When its connection breaks
it goes on as a good client does: from the last number it saw, or with the same request under the same key.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.crash.client import Json, Seen, post, resume
from tests.crash.contract import FLUSH, SLACK
from tests.crash.server import MortalServer
from tests.invariants import check_stream
from tests.upstream import Answer, Received, Say, Stream, chunk, chunks, usage
from tests.wire import Answer as Told
from tests.wire import Wire

PATIENCE = 30.0
"""Seconds within which a turn must have ended, whatever happens meanwhile."""

_TURNS = 10
_PAUSE = 0.05
_WORDS = " ".join(f"word{number}" for number in range(16))


@dataclass(slots=True)
class Report:
    """What has happened. `wrong` holds a sentence for each thing that must not have."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest: float = 0.0


class Model:
    """The upstream's side: what it was told, by the request's own input."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self.told: defaultdict[str, list[list[str]]] = defaultdict(list)

    def answer(self, received: Received) -> Answer:
        messages = received.json["messages"]
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        self.told[messages[-1]["content"]].append(said)
        number = received.number
        say = Say(f"answer {number} says {_WORDS}", calls=[("look", {"at": number})])
        return Stream(
            [*chunks(say, number), {**chunk(), "choices": [], "usage": usage(10, 5)}],
            pace=self._random.choice((0, 0.002, 0.01)),
        )


class Conversation:
    """Turns of one thread, one after another. `kills` tells how often a server was killed until now."""

    def __init__(
        self, name: str, servers: Sequence[MortalServer], model: Model, report: Report, kills: Callable[[], int]
    ) -> None:
        self._name = name
        self._servers = servers
        self._model = model
        self._report = report
        self._kills = kills
        self._random = Random(name)
        self._session = self._random.random() < 0.5
        self._previous: str | None = None
        self._committed: list[str] = []  # what the model has said in the turns that count

    async def run(self, stopping: asyncio.Event) -> None:
        for number in range(_TURNS):
            if stopping.is_set():
                return
            text = f"{self._name}, turn {number}"
            began = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._turn(text)
            except TimeoutError:
                self._wrong(text, f"it has not ended within {PATIENCE:g} s")
                return
            except AssertionError as error:
                self._wrong(text, str(error).splitlines()[0] if str(error) else repr(error.__traceback__))
                return
            self._report.longest = max(self._report.longest, time.monotonic() - began)

    def _wrong(self, text: str, what: str) -> None:
        self._report.wrong.append(f"{text}: {what}")

    @property
    def _url(self) -> str:
        return self._random.choice(self._servers).url

    async def _turn(self, text: str) -> None:
        before = self._kills()
        background = self._random.random() < 0.5
        manner = self._random.choice(("follow", "follow", "follow", "leave", "cancel" if background else "follow"))
        fields: Json = {"model": "test-model", "input": text, "instructions": "Go on.", "background": background}
        if self._previous is not None and not self._session:
            fields["previous_response_id"] = self._previous
        headers = {"idempotency-key": text} | ({"session-id": self._name} if self._session else {})
        seen, asked = await self._ask(fields, headers, manner)
        if manner == "cancel":
            await self._tell("POST", f"{seen.id}/cancel")
        await self._follow(seen)
        response = await self._settled(seen)
        self._check_calls(text, asked + (self._kills() - before if background else 0), response)
        self._report.counts[response["status"]] += 1
        if response["status"] == "completed":
            self._previous = response["id"]
            self._committed.append(response["output"][0]["content"][0]["text"])

    async def _ask(self, fields: Json, headers: dict[str, str], manner: str) -> tuple[Seen, int]:
        """Ask until something is seen of a response; how often that took."""
        asked = 0
        while True:
            until = 4 if manner != "follow" else None
            asked += 1
            seen = await post(self._url, fields, headers, until)
            if seen.events:
                return seen, asked
            assert seen.status in (None, 200, 503), f"it was refused: {seen.status} {seen.error}"
            self._report.counts["asked again"] += 1
            await asyncio.sleep(_PAUSE)

    async def _follow(self, seen: Seen) -> None:
        """Follow to the end. What a crash took away is told by an end that has a lower number."""
        assert seen.id is not None
        while not seen.ended:
            part = await resume(self._url, seen.id, seen.last)
            assert part.status in (None, 200, 503), f"it is gone: {part.status} {part.error}"
            self._report.counts["resumed"] += bool(part.events)
            for event, at in zip(part.events, part.times, strict=True):
                follows = event["sequence_number"] == seen.last + 1
                closes = event["type"] == "response.failed" and event["sequence_number"] <= seen.last
                assert follows or closes, f"{event['type']} {event['sequence_number']} came after {seen.last}"
                seen.events.append(event)
                seen.times.append(at)
            seen.lost = seen.lost or part.lost
            if not part.events:
                await asyncio.sleep(_PAUSE)

    async def _settled(self, seen: Seen) -> Json:
        """The response as it is in the end, which holds all that was seen."""
        response: Json = (await self._tell("GET", f"{seen.id}")).json
        told = seen.events[-1]["response"]
        differ = [name for name in told if response.get(name) != told[name]]
        assert response == told, f"the end that was seen is not the one that is kept: {', '.join(differ)}"
        assert response["output"][: len(seen.items)] == seen.items or response["status"] == "cancelled", (
            "an item that was done is not in the output"
        )
        whole = Seen()
        while not whole.ended:
            whole = await resume(self._url, str(seen.id))
        check_stream(whole.events)
        assert whole.events[-1] == seen.events[-1], "two followers were told different ends"
        self._check_text(seen, whole)
        return response

    @staticmethod
    def _check_text(seen: Seen, whole: Seen) -> None:
        ended = seen.times[-1] if seen.events[-1]["sequence_number"] > seen.events[-2]["sequence_number"] else None
        before = float("inf") if ended is not None else seen.times[-2] - FLUSH - SLACK
        assert whole.text().startswith(seen.text(before)), "text that is older than the flush interval is lost"

    async def _tell(self, method: str, path: str) -> Told:
        """Ask until there is an answer."""
        while True:
            try:
                async with Wire(self._url) as wire:
                    answer = await wire.request(method, f"/v1/responses/{path}")
            except ConnectionError:
                await asyncio.sleep(_PAUSE)
                continue
            if answer.status != 503:
                assert answer.status == 200, f"{method} {path} was answered {answer.status}: {answer.body[:300]!r}"
                return answer
            await asyncio.sleep(_PAUSE)

    def _check_calls(self, text: str, allowed: int, response: Json) -> None:
        told = self._model.told[text]
        assert len(told) <= allowed, f"the upstream was called {len(told)} times, and {allowed} were allowed"
        assert all(said == self._committed for said in told), "the upstream was told another history"
        assert told or response["status"] != "completed", "it completed without the upstream"
