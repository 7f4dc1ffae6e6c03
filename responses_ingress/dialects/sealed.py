"""Encrypted content, tagged with the backend that made it.

What must stay true: only the backend that sealed a content gets it back; to any other it does not exist. Knows nothing
of what is encrypted.
"""


def seal(backend: str, content: str) -> str:
    """`content` as clients and the store see it."""
    return f"{backend}:{content}"


def unseal(backend: str, content: str | None) -> str | None:
    """What `backend` had sealed, or None for what is not its own."""
    if content is None or not content.startswith(f"{backend}:"):
        return None
    return content[len(backend) + 1 :]
