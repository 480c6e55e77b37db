"""Many clients at once against a running server: errors, order, speed, and what it leaves in memory.

  python -m uhd_jax.serving.load --url=http://127.0.0.1:8000/v1 --model=NAME --image=page.png --clients=64 --minutes=5 \
    --pid=PID

Every client asks, reads the whole streamed answer, and asks again. Some requests show an image, some of them one that
nobody has shown before; some are given up in the middle. Before the load the same requests are sent one by one, for the
ratio. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import statistics
import threading
import time
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from uhd_jax.slicing.image_io import open_image


class Client:
    """Sends requests of many kinds, the same ones for the same seed, and keeps what came of them."""

    def __init__(self, url: str, key: str, model: str, image: Image.Image, tokens: int, seed: int):
        self.place, self.key, self.model, self.tokens = urlsplit(url), key, model, tokens
        self._image, self._random = image, random.Random(seed)
        self.answers: list[tuple[float, float, float, int]] = []  # sent, first text, end, tokens
        self.given_up, self.errors = 0, []

    def ask(self, give_up: bool = False) -> None:
        """One request, read to its end or left in its middle."""
        content: list[dict[str, Any]] = [{"type": "text", "text": f"What is in row {self._random.randint(1, 3)}?"}]
        if self._random.random() < 0.5:
            content.insert(0, {"type": "image_url", "image_url": {"url": self._picture()}})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": self.tokens}
        body |= {
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": self._random.choice([0, 0, 1]),
        }
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        connection = http.client.HTTPConnection(self.place.hostname, self.place.port, timeout=600)
        sent, first, count = time.monotonic(), None, 0
        try:
            connection.request("POST", f"{self.place.path}/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {answer.read()[:300]!r}")
            complete = False
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                if first is None:
                    first = time.monotonic()
                if line.startswith(b"data: [DONE]"):
                    complete = True
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                if event.get("usage"):
                    count = event["usage"]["completion_tokens"]
                elif give_up:
                    self.given_up += 1
                    return
            if not complete:
                raise ValueError("the answer broke off")
            self.answers.append((sent, first, time.monotonic(), count))
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.errors.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def _picture(self) -> str:
        image = self._image.copy()
        if self._random.random() < 0.5:  # a new one
            image.putpixel((0, 0), tuple(self._random.randrange(256) for _ in range(3)))
        file = io.BytesIO()
        image.save(file, "PNG")
        return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(pid: int | None) -> float:
    """That a process has used; 0 where none is watched."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One by one, then all at once."""
    image = Image.fromarray(open_image(arguments.image))
    make = (arguments.url, arguments.key, arguments.model, image, arguments.tokens)
    alone = Client(*make, seed=0)
    worked = [processor_seconds(arguments.pid)]
    began = time.monotonic()
    for _ in range(arguments.alone):
        alone.ask()
        if alone.errors:
            raise SystemExit(f"{arguments.url}: {alone.errors[0]}")
    alone_seconds = time.monotonic() - began
    worked.append(processor_seconds(arguments.pid))
    clients = [Client(*make, seed=number) for number in range(1, arguments.clients + 1)]
    memory: list[int] = []
    began = time.monotonic()
    end = began + 60 * arguments.minutes

    def work(client: Client, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end and not client.errors:
            client.ask(give_up=chance.random() < arguments.give_up)

    threads = [threading.Thread(target=work, args=(client, number)) for number, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if arguments.pid:
            memory.append(resident_bytes(arguments.pid))
        time.sleep(1)
    seconds = time.monotonic() - began
    worked.append(processor_seconds(arguments.pid))
    answers = sorted(answer for client in clients for answer in client.answers)
    if not answers:
        raise SystemExit(f"{arguments.url}: no answer at all; {next((c.errors[0] for c in clients if c.errors), '')}")
    counts = [len(client.answers) + client.given_up for client in clients]
    firsts = [answer[1] for answer in answers]
    place = {value: rank for rank, value in enumerate(sorted(firsts))}
    late = [abs(place[value] - rank) for rank, value in enumerate(firsts)]
    waits = sorted(answer[1] - answer[0] for answer in answers)
    median = statistics.median(waits)
    tokens = sum(answer[3] for answer in answers)
    tokens_alone = sum(answer[3] for answer in alone.answers)
    quarter = len(memory) // 4
    return {
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "answers": len(answers),
        "given_up": sum(client.given_up for client in clients),
        "errors": [error for client in [alone, *clients] for error in client.errors],
        "answers_per_client": {"least": min(counts), "most": max(counts)},
        "places_out_of_order": {"median": statistics.median(late), "most": max(late)},
        "first_text_seconds": {
            "median": round(median, 3),
            "of 19 in 20 at most": round(waits[len(waits) * 19 // 20], 3),
            "most": round(waits[-1], 3),
            "most_by_median": round(waits[-1] / median, 2),
        },
        "answers_per_second": round(len(answers) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "tokens_per_second_one_by_one": round(tokens_alone / alone_seconds, 2),
        "ratio": round(tokens / seconds / (tokens_alone / alone_seconds), 2),
        "server_processor_seconds_per_token": {
            "one_by_one": round((worked[1] - worked[0]) / tokens_alone, 5),
            "together": round((worked[2] - worked[1]) / tokens, 5),
        },
        "memory_mib": {
            "every_half_minute": [value // 2**20 for value in memory[::30]],
            "second_quarter": max(memory[quarter : 2 * quarter], default=0) // 2**20,
            "last_quarter": max(memory[-quarter:], default=0) // 2**20,
        },
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of the server, with /v1")
    parser.add_argument("--image", required=True, help="an image to ask about")
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument("--key", default=os.environ.get("UHD_JAX_API_KEY", "none"), help="the API key")
    parser.add_argument("--clients", type=int, default=64, help="at once (%(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of load (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most (%(default)s)")
    parser.add_argument("--alone", type=int, default=20, help="requests sent one by one before (%(default)s)")
    parser.add_argument("--give-up", type=float, default=0.05, help="share of answers left in the middle (%(default)s)")
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory and work")
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
