"""How alembic reaches the database.

In the program and in tests: through the connection it is given, within that connection's transaction.
On the command line: through the server's own settings, or those of the file that `-x config=FILE` names.
"""

import asyncio
from logging.config import fileConfig
from pathlib import Path

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection

from responses_ingress.errors import SettingsError
from responses_ingress.settings import Settings, load
from responses_ingress.store.migrate import transaction
from responses_ingress.store.tables import metadata


def settings() -> Settings:
    config = context.get_x_argument(as_dictionary=True).get("config")
    return load(Path(config) if config else None, {})


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        # Alembic assumes the driver's default on SQLite; ours begins transactions itself.
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_offline() -> None:
    context.configure(url=settings().async_database_url, target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


async def run_online() -> None:
    async with transaction(settings().async_database_url) as connection:
        await connection.run_sync(run)


def main() -> None:
    given = context.config.attributes.get("connection")
    if given is not None:
        run(given)
        return
    if context.config.config_file_name is not None:
        fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    try:
        if context.is_offline_mode():
            run_offline()
        else:
            asyncio.run(run_online())
    except SettingsError as error:
        raise CommandError(error.message) from None


main()
