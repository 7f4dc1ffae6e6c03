from hashlib import sha256

import pytest

from responses_ingress.web.callers import Keyring
from tests.web.asgi import Site, opened_site

# What codex 0.110 to 0.169 wants of every entry; without one of them it takes none.
WANTED = {
    "slug",
    "display_name",
    "description",
    "supported_reasoning_levels",
    "shell_type",
    "visibility",
    "supported_in_api",
    "priority",
    "support_verbosity",
    "supports_reasoning_summaries",
    "supports_parallel_tool_calls",
    "apply_patch_tool_type",
    "truncation_policy",
    "experimental_supported_tools",
    "base_instructions",
}


async def test_the_list_is_openais(site: Site) -> None:
    answer = await site.get("/v1/models")
    model = {"id": "scripted-model", "object": "model", "created": 0, "owned_by": "responses-ingress"}
    assert (answer.status, answer.json) == (200, {"object": "list", "data": [model]})


async def test_codex_gets_its_own_catalogue(site: Site) -> None:
    answer = await site.get("/v1/models?client_version=0.169.0")
    (entry,) = answer.json["models"]
    assert set(entry) >= WANTED
    assert (entry["slug"], entry["display_name"]) == ("scripted-model", "scripted-model")
    assert set(answer.json) == {"models"}


async def test_one_model_is_found_by_its_name_also_with_slashes(site: Site) -> None:
    found = await site.get("/v1/models/scripted-model")
    assert (found.status, found.json["id"]) == (200, "scripted-model")


@pytest.mark.parametrize("name", ["none", "vendor/none", "x" * 1000])
async def test_an_unknown_model_is_not_found(site: Site, name: str) -> None:
    answer = await site.get(f"/v1/models/{name}")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert name[:100] in answer.error["message"]
    assert len(answer.error["message"]) < 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/scripted-model"])
async def test_models_need_a_key_where_there_are_keys(migrated_database: str, path: str) -> None:
    keys = Keyring((("a", sha256(b"key-a").digest()),))
    async with opened_site(migrated_database, keys=keys) as site:
        assert (await site.get(path)).status == 401
        assert (await site.get(path, {"x-api-key": "key-a"})).status == 200
