"""GET /v1/models: OpenAI's list, and codex's own catalogue.

Codex decodes a catalogue entry only when every field below is there (measured on 0.110 to 0.169); it
asks with `client_version` in the query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from responses_ingress.errors import NotFound
from responses_ingress.runs.runner import Runner
from responses_ingress.web.callers import Keyring
from responses_ingress.web.exchange import Exchange

BASE_INSTRUCTIONS = """\
You are a coding agent that works in a user's terminal through the Codex CLI, together with the user.

- Look before you change: read the files that matter, and the project's own notes for contributors.
- Use only the tools you are given, with the arguments they describe; run commands one step at a time.
- Make the smallest change that does what was asked, in the style of the code around it.
- Never undo or overwrite changes you did not make, and ask before anything that cannot be taken back.
- Check your work by running it or the project's tests, and say plainly what you could not check.
- Answer briefly: what you did, where, and what is left to do.
"""
"""What codex tells a model whose catalogue entry is ours; it sends nothing of its own then."""

_CATALOGUE_ENTRY: dict[str, Any] = {
    "description": None,
    "supported_reasoning_levels": [],
    "shell_type": "unified_exec",
    "visibility": "list",
    "supported_in_api": True,
    "priority": 0,
    "support_verbosity": False,
    "supports_reasoning_summaries": False,
    "supports_parallel_tool_calls": True,
    "apply_patch_tool_type": None,
    "truncation_policy": {"mode": "bytes", "limit": 10_000},
    "experimental_supported_tools": [],
    "base_instructions": BASE_INSTRUCTIONS,
}


@dataclass(frozen=True, slots=True)
class Models:
    runner: Runner
    keyring: Keyring

    async def list(self, exchange: Exchange) -> None:
        self.keyring.tenant(exchange.headers)
        names = await self.runner.models()
        if "client_version" in exchange.query():
            await exchange.reply({"models": _catalogue(names)})
        else:
            await exchange.reply({"object": "list", "data": [_model(name) for name in names]})

    async def retrieve(self, exchange: Exchange) -> None:
        self.keyring.tenant(exchange.headers)
        name = exchange.path_params["model"]
        if name not in await self.runner.models():
            raise NotFound(f"The model '{name[:100]}' does not exist.", param="model", code="model_not_found")
        await exchange.reply(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "responses-ingress"}


def _catalogue(names: Sequence[str]) -> Sequence[dict[str, Any]]:
    return [{"slug": name, "display_name": name, **_CATALOGUE_ENTRY} for name in names]
