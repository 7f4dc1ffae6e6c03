"""The proxies that the process's environment names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@contextmanager
def proxies(**named: str) -> Iterator[None]:
    """These proxies and no others."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.lower() in _NAMES}
    os.environ.update(named)
    try:
        yield
    finally:
        for name in named:
            del os.environ[name]
        os.environ.update(before)
