"""`HttpLimits`: what one client may ask of the transport."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HttpLimits:
    """Over a limit: 431, 413, 400, 408, 504, or a closed connection. Sizes in bytes, times in seconds."""

    body: int = 1 << 20
    head: int = 16 << 10  # of all header lines
    headers: int = 64
    depth: int = 32  # of lists and objects in a body
    body_pieces: int = 1 << 14
    keys: int = 1024
    connections: int = 2048
    unfinished: int = 256  # connections whose request is not yet all here
    send: float = 10.0  # until a request is all here
    idle: float = 30.0
    queue: float = 60.0  # until the first step of the engine
    request: float = 600.0
    stalled: float = 30.0  # without the client reading
    drain: float = 30.0  # for running requests when the server ends
    quiet: float = 15.0  # without an event of a stream; then it gets a comment line
