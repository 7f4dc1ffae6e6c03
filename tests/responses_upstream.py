"""A scripted Responses provider for tests: answers to `POST /responses` come from the script, what polls see from
a list of its own, and cancels are recorded.

    async with Provider(streamed(text_item("hi"))) as provider:
        ...                       # let something call provider.url + "/responses"
        assert provider.calls[0].json["input"] == [...]
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from responses_ingress.core.replay import deltas_of
from tests.core.shapes import DONE, ENVELOPE, Json, events_of
from tests.upstream import Answer, Close, Received, Reply, Stream, Upstream

CREATE = "/v1/responses"
ID = "resp_theirs"


class Provider(Upstream):
    """`calls` are the requests for responses, `polls` those that ask for one, `cancels` those that end one."""

    def __init__(self, *answers: Answer, models: Sequence[str] = ("test-model",)) -> None:
        super().__init__(*answers, models=models)
        self.on_cancel: Answer = Reply(response("cancelled"))
        self.on_models: Answer | None = None
        self._looks: deque[Answer] = deque()

    @property
    def calls(self) -> list[Received]:
        return [request for request in self.requests if request.path == CREATE]

    @property
    def polls(self) -> list[Received]:
        found = [request for request in self.requests if request.method == "GET"]
        return [request for request in found if request.path.startswith(f"{CREATE}/")]

    @property
    def cancels(self) -> list[str]:
        return [request.path for request in self.requests if request.path.endswith("/cancel")]

    def looks(self, *answers: Answer) -> None:
        """Add what polls find, one answer each; the last one stays."""
        self._looks.extend(answers)

    def looks_over(self) -> None:
        """Forget the answer that stayed."""
        self._looks.clear()

    async def take(self, received: Received) -> Answer:
        if not received.path.startswith(CREATE):
            listed = await super().take(received)
            return self.on_models or listed
        received.number = len(self.requests)
        self.requests.append(received)
        async with self._arrived:
            self._arrived.notify_all()
        if received.path.endswith("/cancel"):
            return self.on_cancel
        source = self._script if received.path == CREATE else self._looks
        if not source:
            return Reply({"error": {"message": "The test's script foresees no such call."}}, status=418)
        return source[0] if source is self._looks and len(source) == 1 else source.popleft()

    async def polled(self, count: int) -> None:
        """Wait until polls have come `count` times."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.polls) >= count)

    async def cancelled(self) -> None:
        """Wait until a response was cancelled."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: bool(self.cancels))


def response(status: str, *output: Json, **fields: Any) -> Json:
    """A response object of the provider's."""
    return {**ENVELOPE, "id": ID, "status": status, "store": False, "output": list(output), **fields}


def whole(*output: Json, **fields: Any) -> Reply:
    """A completed response in one piece."""
    return Reply(response("completed", *output, **fields))


def streamed(*output: Json, close: Close = "end", envelope: Mapping[str, Any] | None = None) -> Stream:
    """The same as a stream, as OpenAI sends it."""
    return Stream([named(event) for event in events(*output, envelope=envelope)], close=close)


def events(*output: Json, envelope: Mapping[str, Any] | None = None) -> list[Json]:
    return events_of([*deltas_of(output), DONE], envelope or response("in_progress"))


def named(event: Mapping[str, Any]) -> bytes:
    """An event with its name on a line of its own."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
