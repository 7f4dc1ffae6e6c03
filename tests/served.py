"""A small application for tests of `serving`, and a program that serves it. No database, no settings: it starts
as quickly as Python does.

    python -c "from tests.served import main; main()" PORT WORKERS

It says in its answers which process answers (`/`), ends that process (`/crash`), and is told by the environment
how it starts and stops: `SERVED_FAILS` names a file that keeps it from starting while it is there; `SERVED_GRACE`
is how many seconds it takes to stop.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import uvicorn

from responses_ingress import serving

FAILS, GRACE, STOPPED = "SERVED_FAILS", "SERVED_GRACE", "served stops"


class _App:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["path"] == "/crash":
            os._exit(1)
        body = str(os.getpid()).encode()
        headers = [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def stop(self) -> None:
        print(STOPPED, flush=True)
        await asyncio.sleep(float(os.environ.get(GRACE, "0")))


async def _live(receive: Any, send: Any) -> None:
    await receive()
    if _fails():
        await send({"type": "lifespan.startup.failed", "message": "It does not want to."})
        return
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def _fails() -> bool:
    return FAILS in os.environ and Path(os.environ[FAILS]).exists()


def make_config() -> uvicorn.Config:
    port = int(sys.argv[1])
    return uvicorn.Config(_App(), host="127.0.0.1", port=port, lifespan="on", access_log=False, proxy_headers=False)


def main() -> None:
    workers = int(sys.argv[2])
    if workers == 1:
        sys.exit(serving.run(make_config()))
    sys.exit(serving.run_workers(workers, make_config().bind_socket(), make_config))
