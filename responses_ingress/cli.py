"""The command line: `serve`, `migrate`, `check`, `verify`.

What must stay true: a mistake in the configuration or a database that cannot be used is one sentence on
stderr and exit code 2 (`check`: 1), never a traceback; flags are settings and nothing else, so that all
that a flag can say can be said in the file and the environment too.
"""

import asyncio
import itertools
import math
import os
import re
import sys
from collections.abc import Awaitable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import uvicorn
from uvicorn.config import LOGGING_CONFIG

from responses_ingress import serving
from responses_ingress.app import create_app, make_backends
from responses_ingress.backends.base import Backend
from responses_ingress.errors import IngressError, SettingsError
from responses_ingress.settings import PREFIX, Settings, Upstream, load
from responses_ingress.store import migrate as migrations
from responses_ingress.store import verify as verification
from responses_ingress.store.verify import Finding

_PATIENCE = 10.0
_KEEP_ALIVE = 75
_DRAIN = 5  # seconds for the last bytes of streams that have ended

_config = click.option("--config", type=click.Path(path_type=Path), help="TOML file with settings.")
_database = click.option("--database-url", help="sqlite:///FILE or postgresql://…")
_backend = click.option("--backend", type=click.Choice(["echo", "chat"]), help="The kind of the one upstream.")
_upstream = click.option("--upstream", metavar="URL", help="Address of the one upstream, with /v1.")


class _Misconfigured(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise _Misconfigured(error.message) from None


@click.group(cls=_Group)
@click.version_option(package_name="responses-ingress", prog_name="responses-ingress")
def main() -> None:
    """The OpenAI Responses API in front of any model.

    Settings come from flags, from RESPONSES_INGRESS_… in the environment and from a TOML file, in this order.
    """


@main.command()
@_config
@click.option("--host", help="Address to listen on [default: 127.0.0.1].")
@click.option("--port", type=int, help="Port to listen on [default: 8080].")
@_database
@_backend
@_upstream
@click.option("--workers", type=int, help="Number of processes [default: 1].")
@click.option("--insecure", is_flag=True, default=None, help="Listen on any address without API keys.")
def serve(config: Path | None, **flags: Any) -> None:
    """Run the server. Without any settings: SQLite, loopback, the echo backend."""
    settings = load(config, flags)
    asyncio.run(migrations.ensure(settings.async_database_url, auto=settings.migrates))
    _announce(settings)
    if settings.workers == 1:
        sys.exit(serving.run(uvicorn.Config(create_app(settings), **_server_options(settings))))
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    os.environ.update(settings.to_environment())
    listener = uvicorn.Config(create_app, **_server_options(settings)).bind_socket()
    sys.exit(serving.run_workers(settings.workers, listener, worker_config))


def worker_config() -> uvicorn.Config:
    """What one of several workers serves: `serve` has put the settings into the environment."""
    settings = load(None, {})
    return uvicorn.Config(create_app(settings), **_server_options(settings))


def _announce(settings: Settings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    click.echo(f"Database  {migrations.shown(settings.database_url)}")
    for name, upstream in settings.effective_upstreams.items():
        click.echo(f"Upstream  {_title(name, upstream)}")
    if settings.workers > 1 and settings.database_url.startswith("sqlite"):
        click.echo(
            "Workers   on SQLite they take turns at writing, and learn of each other's work within a second:"
            " no more throughput, and later events for who follows a response of another worker"
        )
    port = settings.port or "<a free port>"
    click.echo(f"Address   http://{host}:{port}/v1")


def _title(name: str, upstream: Upstream) -> str:
    return f"{name} ({upstream.kind}{f', {_shown(upstream.url)}' if upstream.url else ''})"


def _shown(url: str) -> str:
    """The URL as a person may see it: without name and password."""
    return re.sub(r"(?<=://)[^/?#]*@", "***@", url)


def _server_options(settings: Settings) -> dict[str, Any]:
    logging = deepcopy(LOGGING_CONFIG)
    level = settings.log_level.upper()
    logging["loggers"]["responses_ingress"] = {"handlers": ["default"], "level": level, "propagate": False}
    return {
        "host": settings.host,
        "port": settings.port,
        "loop": "auto" if sys.platform == "win32" else "uvloop",
        "http": "httptools",
        "ws": "websockets-sansio",
        "lifespan": "on",
        "log_config": logging,
        "log_level": settings.log_level,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": _KEEP_ALIVE,
        "timeout_graceful_shutdown": math.ceil(settings.shutdown_grace) + _DRAIN,
    }


@main.command()
@_config
@_database
@click.option("--revision", default="head", show_default=True, help="How far to go.")
def migrate(config: Path | None, revision: str, **flags: Any) -> None:
    """Bring the database to the newest schema."""
    settings = load(config, flags)
    asyncio.run(migrations.migrate(settings.async_database_url, revision))
    click.echo(f"The database {migrations.shown(settings.database_url)} is at {revision}.")


@main.command()
@_config
@_database
def verify(config: Path | None, **flags: Any) -> None:
    """Look for damage in the database, which may be in use: a line for each finding. Changes nothing."""
    settings = load(config, flags)
    found, seen = asyncio.run(_verify(settings))
    looked_at = ", ".join(f"{count} {table}" for table, count in seen.items())
    click.echo(f"{found or 'no'} finding{'' if found == 1 else 's'} in {looked_at}")
    if found:
        sys.exit(1)


async def _verify(settings: Settings) -> tuple[int, Mapping[str, int]]:
    """How much is wrong, and how many rows of each table were looked at."""
    url, found = settings.async_database_url, itertools.count()
    if missing := migrations.missing_file(url):
        raise SettingsError(f"The file {missing} does not exist.")
    await migrations.ensure(url, auto=False)

    def tell(finding: Finding) -> None:
        next(found)
        click.echo(finding)

    seen = await verification.verify(url, settings.lease, tell)
    return next(found), seen


@main.command()
@_config
@_database
@_backend
@_upstream
def check(config: Path | None, **flags: Any) -> None:
    """Read the settings, try the database and every upstream, and say what is wrong."""
    try:
        settings = load(config, flags)
    except SettingsError as error:
        click.echo(f"wrong  settings: {error.message}")
        sys.exit(1)
    click.echo("fine   settings")
    if not all(asyncio.run(_check(settings))):
        sys.exit(1)


async def _check(settings: Settings) -> list[bool]:
    found = [await _report("database", _check_database(settings))]
    backends = make_backends(settings)
    for name, upstream in settings.effective_upstreams.items():
        found.append(await _report(f"upstream {_title(name, upstream)}", _check_upstream(upstream, backends[name])))
        await backends[name].close()
    return found


async def _report(what: str, check: Awaitable[str]) -> bool:
    try:
        click.echo(f"fine   {what}: {await check}")
    except IngressError as error:
        click.echo(f"wrong  {what}: {error.message}")
        return False
    return True


async def _check_database(settings: Settings) -> str:
    """In what state it is. Looking must not create the file."""
    url = settings.async_database_url
    if missing := migrations.missing_file(url):
        if not missing.parent.is_dir():
            raise SettingsError(f"The folder {missing.parent} does not exist.")
        state = "does not exist yet"
    elif await migrations.is_current(url):
        return f"{migrations.shown(url)} has the newest schema"
    else:
        state = "does not have the newest schema"
    if not settings.migrates:
        raise SettingsError(f"{migrations.shown(url)} {state}. Run: responses-ingress migrate")
    return f"{migrations.shown(url)} {state}; serve will see to it"


async def _check_upstream(upstream: Upstream, backend: Backend) -> str:
    try:
        async with asyncio.timeout(_PATIENCE):
            models = await backend.models()
    except TimeoutError:
        raise SettingsError(f"It did not answer within {_PATIENCE:g} s.") from None
    except IngressError as error:
        if upstream.pass_bearer and error.status in (401, 403):
            return "it answers, and wants the client's key"
        raise
    return f"models: {', '.join(models) or 'any'}"
