"""Server-sent events as bytes: a parser for upstreams, and the framing of our own events.

What must stay true: however a stream is cut into chunks, the same events come out, in linear time; an
event that a stream leaves without its blank line does not exist (WHATWG, "interpreting an event
stream"). Knows nothing of what the data means. `id:` and `retry:` fields are ignored: no upstream is
ever reconnected to by them.
"""

from responses_ingress.errors import UpstreamInvalid

ServerEvent = tuple[str | None, bytes]
"""The event's name, if it has one, and its data."""

_PLAIN = b"data: "
_BOM = b"\xef\xbb\xbf"
_DEFAULT_LIMIT = 64 * 1024 * 1024


class Parser:
    """Chunks of a stream in, whole events out. `limit` bounds the bytes of one event."""

    def __init__(self, limit: int = _DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._pending: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that `chunk` completes. Raises `UpstreamInvalid` for one that is too large."""
        if chunk and (self._after_cr or b"\r" in chunk):
            chunk = self._fold(chunk)
        if not chunk:
            return []
        if b"\n\n" in chunk or (self._pending and chunk[0] == 10 and self._pending[-1].endswith(b"\n")):
            return self._split(chunk)
        self._keep(chunk)
        return []

    def _fold(self, chunk: bytes) -> bytes:
        """The chunk with LF line ends only. A CR at its end is a line end already; an LF that begins the
        next chunk then belongs to it."""
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _split(self, chunk: bytes) -> list[ServerEvent]:
        blocks = b"".join((*self._pending, chunk)).split(b"\n\n")
        if self._at_start:
            self._at_start = False
            blocks[0] = blocks[0].removeprefix(_BOM)
        self._pending, self._size = [], 0
        rest = blocks.pop()
        if rest:
            self._keep(rest)
        events = []
        for block in blocks:
            self._check(len(block))
            name, data = (None, block[6:]) if block.startswith(_PLAIN) and b"\n" not in block else _parse(block)
            if data:
                events.append((name, data))
        return events

    def _keep(self, rest: bytes) -> None:
        self._pending.append(rest)
        self._size += len(rest)
        self._check(self._size)

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise UpstreamInvalid(f"The upstream sent an event of more than {self._limit} bytes.")


def _parse(block: bytes) -> ServerEvent:
    name: str | None = None
    data = []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ").decode("utf-8", "replace") or None
    return name, b"\n".join(data)


def frame(type: str, data: bytes) -> bytes:
    """One event of ours. `data` is JSON without line ends."""
    return b"event: %b\ndata: %b\n\n" % (type.encode(), data)
