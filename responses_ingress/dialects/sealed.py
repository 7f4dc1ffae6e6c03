"""Encrypted reasoning under the name of the backend that made it.

What must stay true: it goes back to the backend of that name only, because no other can read it and most
refuse the request for it (decisions: "encrypted reasoning"). Knows nothing of what is sealed.
"""


def seal(backend: str, content: str) -> str:
    """`content` as clients keep it in `encrypted_content`."""
    return f"{backend}:{content}"


def unseal(backend: str, content: str | None) -> str | None:
    """What `backend` itself had sealed; None for all else."""
    tag = f"{backend}:"
    return content[len(tag) :] if content is not None and content.startswith(tag) else None
