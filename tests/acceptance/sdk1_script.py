"""Run by `test_sdk.test_sdk_1` with a Python that has openai 1.x: walks through the API against the base
URL given and prints as JSON what came back. The answers are scripted there."""

import json
import sys
from typing import Any

import openai
from openai import OpenAI
from openai.types.responses import FunctionToolParam
from pydantic import BaseModel

MODEL = "test-model"
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


class City(BaseModel):
    name: str
    people: int


def walk(client: OpenAI) -> dict[str, Any]:
    seen: dict[str, Any] = {"version": openai.__version__}
    created = client.responses.create(model=MODEL, input="Capital of France?")
    seen["created"] = created.output_text
    seen["retrieved"] = client.responses.retrieve(created.id).output_text

    stream = client.responses.create(model=MODEL, input="Count", stream=True, previous_response_id=created.id)
    seen["streamed"] = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    with client.responses.stream(model=MODEL, input="Go on") as helper:
        seen["helper"] = helper.get_final_response().output_text
    parsed = client.responses.parse(model=MODEL, input="Oslo?", text_format=City).output_parsed
    seen["parsed"] = parsed and parsed.model_dump()

    seen |= _tool_loop(client)
    seen |= _errors(client, created.id)
    return seen


def _tool_loop(client: OpenAI) -> dict[str, Any]:
    asked = client.responses.create(model=MODEL, input="Weather in Rome?", tools=[WEATHER])
    call = asked.output[0]
    assert call.type == "function_call"
    answered = client.responses.create(
        model=MODEL,
        previous_response_id=asked.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}],
        tools=[WEATHER],
    )
    inputs = [item.type for item in client.responses.input_items.list(answered.id)]
    return {"arguments": json.loads(call.arguments), "answered": answered.output_text, "inputs": inputs}


def _errors(client: OpenAI, response_id: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    try:
        client.responses.create(model=MODEL, input="Refuse me")
    except openai.BadRequestError as error:
        assert isinstance(error.body, dict)
        seen["refused"] = error.body["message"]
    client.responses.delete(response_id)
    try:
        client.responses.retrieve(response_id)
    except openai.NotFoundError as error:
        seen["deleted"] = error.status_code
    return seen


if __name__ == "__main__":
    print(json.dumps(walk(OpenAI(base_url=sys.argv[1], api_key="test", max_retries=0))))
