"""What a server is and what it allows."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits of a server. What is beyond them is refused with the status named."""

    name: str  # of the model, as clients ask for it
    api_key: str = ""  # empty: none is asked for
    max_body_bytes: int = 32 * 2**20  # 413
    max_images: int = 16  # of a request; 400
    max_pixels: int = 50_000_000  # of a request's images together; 400
    max_views: int = 64  # of a request; 400
    max_new_tokens: int = 2048  # of an answer; 400
    default_new_tokens: int = 512
    max_choices: int = 8  # n; 400
    seconds: float = 300.0  # from the request to the end of its answer; 504
    body_seconds: float = 30.0  # for the head of a request to arrive, and for its body; 408
    send_seconds: float = 30.0  # that a client may leave a piece of its answer unread; the connection is closed
    drain_seconds: float = 30.0  # that running requests have to end when the server stops; then 503
    fetch_hosts: tuple[str, ...] = ()  # hosts, or host:port, from which images are fetched
    fetch_bytes: int = 20 * 2**20  # of such an image; 400
    fetch_seconds: float = 10.0
    prepare_threads: int = 2  # that decode images and encode prompts
    demo: bool = False
    hosts: tuple[str, ...] = ()  # names by which a client may call the server, against DNS rebinding; empty: any; 421
