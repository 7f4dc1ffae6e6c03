"""The requests the benchmark sends. Deterministic: no clock, no randomness."""

from typing import Any

import orjson

Json = dict[str, Any]

_SENTENCE = "The quick brown fox reads every line of the file before it changes one of them. "


def text(length: int, salt: str = "") -> str:
    """Plain text of exactly `length` characters."""
    return ((salt + _SENTENCE) * (length // len(_SENTENCE) + 1))[:length]


def body(model: str, given: str | list[Json] = "Say hello.", **fields: Any) -> str:
    """A request body."""
    return orjson.dumps({"model": model, "input": given, **fields}).decode()


def codex_body(model: str) -> str:
    """A request as codex sends it late in a session: 91 kB, 62 items, 14 tools of all kinds."""
    return body(
        model,
        _codex_items(),
        instructions=text(18_000),
        tools=_codex_tools(),
        tool_choice="auto",
        parallel_tool_calls=True,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        stream=True,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="01a1fa2f-5050-7702-ae36-17b6149fd25e",
        text={"verbosity": "low"},
    )


def _codex_items() -> list[Json]:
    items = [
        _message("developer", text(6_000, "Permissions. ")),
        _message("user", text(700, "<environment_context> ")),
    ]
    for step in range(10):
        items += [
            _message("user", f"Step {step}: {text(300)}"),
            _reasoning(step),
            _call("function_call", step, {"name": "exec_command", "arguments": f'{{"cmd":"sed -n {step}p file"}}'}),
            {"type": "function_call_output", "call_id": f"call_{step}", "output": text(2_160, f"line {step} ")},
            _call("custom_tool_call", 100 + step, {"name": "apply_patch", "input": text(500, "*** Begin Patch\n")}),
            {"type": "custom_tool_call_output", "call_id": f"call_{100 + step}", "output": "Success."},
        ]
    return items


def _message(role: str, said: str) -> Json:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": said}]}


def _reasoning(step: int) -> Json:
    return {
        "type": "reasoning",
        "id": f"rs_{step:050x}",
        "summary": [{"type": "summary_text", "text": text(200, f"Thought {step}. ")}],
        "content": None,
        "encrypted_content": text(1_000).replace(" ", ""),
    }


def _call(type: str, number: int, fields: Json) -> Json:
    return {"type": type, "id": f"call_item_{number}", "call_id": f"call_{number}", **fields}


def _codex_tools() -> list[Json]:
    names = [
        "exec_command",
        "write_stdin",
        "update_plan",
        "request_user_input",
        "view_image",
        "get_goal",
        "create_goal",
        "update_goal",
        "list_resources",
        "read_resource",
    ]
    grammar = {"type": "grammar", "syntax": "lark", "definition": text(1_200, "start: begin_patch hunk+ end_patch\n")}
    return [
        *(_function(name) for name in names),
        {"type": "custom", "name": "apply_patch", "description": text(300), "format": grammar},
        {
            "type": "namespace",
            "name": "multi_agent_v1",
            "description": text(200),
            "tools": [_function(name) for name in ("spawn_agent", "send_input", "wait_agent", "close_agent")],
        },
        {"type": "web_search", "external_web_access": True},
        {"type": "tool_search", "execution": "client", "description": text(200), "parameters": {"type": "object"}},
    ]


def _function(name: str) -> Json:
    properties = {
        f"argument_{at}": {"type": "string", "description": text(120, f"Argument {at} of {name}. ")} for at in range(5)
    }
    return {
        "type": "function",
        "name": name,
        "description": text(250, f"{name}: "),
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": ["argument_0"],
            "additionalProperties": False,
        },
    }
