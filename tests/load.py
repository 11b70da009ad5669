"""Many clients at once ask a captioning service: what they got, how fast, and what it cost.

    python inference.py --model_path exported --serve &
    python tests/load.py --port 7860 --pid $! --clients 200 --seconds 300 photo.jpg more.jpg

Prints how many answers there were by status, and how many connections broke, by when; the times of those that were
captions; and the memory of the service from beginning to end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import time
from pathlib import Path

NOT_CONNECTED = "not connected"
BROKE_SENDING = "broke while the request was sent"
BROKE_ANSWERING = "broke instead of an answer"
HALF_ANSWER = "an answer that is not whole"


def multipart(data: bytes, fields: dict[str, str] | None = None) -> tuple[str, bytes]:
    """(content type, body) of an upload named `image`."""
    parts = [f'--x\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in (fields or {}).items()]
    parts.append('--x\r\nContent-Disposition: form-data; name="image"; filename="photo.jpg"\r\n\r\n')
    return "multipart/form-data; boundary=x", "".join(parts).encode() + data + b"\r\n--x--\r\n"


class Client:
    """Asks one thing after the other, over one connection as long as the service keeps it.

    It sends its request to the end before it looks for an answer, as simple clients do.
    """

    def __init__(self, port: int):
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        if self.streams:
            self.streams[1].close()
        self.streams = None

    async def ask(self, kind: str, body: bytes, pause: float = 0.0, keep: bool = False) -> tuple[int | str, bytes]:
        """One `POST /caption`: (status, body); in the place of the status, how the connection broke.

        Args:
            pause: seconds between two pieces of the body, for a slow client.
            keep: ask for the connection to be kept.
        """
        try:
            if self.streams is None:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return NOT_CONNECTED, b""
        try:
            status, content, kept = await self._ask(*self.streams, kind, body, pause, keep)
        except BaseException:
            self.close()
            raise
        if not kept:
            self.close()
        return status, content

    async def _ask(self, reader, writer, kind, body, pause, keep) -> tuple[int | str, bytes, bool]:
        wish = "keep-alive" if keep else "close"
        head = (
            f"POST /caption HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: {kind}\r\nConnection: {wish}\r\n"
        )
        head += f"Content-Length: {len(body)}\r\n\r\n"
        size = 100 if pause else max(len(body), 1)
        try:
            writer.write(head.encode())
            for first in range(0, len(body), size):
                writer.write(body[first : first + size])
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)
        except OSError:
            return BROKE_SENDING, b"", False
        try:
            answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        except (OSError, asyncio.IncompleteReadError):
            return BROKE_ANSWERING, b"", False
        fields = dict(line.split(": ", 1) for line in answer.splitlines()[1:] if line)
        try:
            content = await reader.readexactly(int(fields["content-length"]))
        except (OSError, asyncio.IncompleteReadError):
            return HALF_ANSWER, b"", False
        return int(answer.split()[1]), content, keep and fields.get("connection") != "close"


async def ask(port: int, kind: str, body: bytes, pause: float = 0.0) -> tuple[int | str, bytes]:
    """`Client.ask` over a connection of its own."""
    client = Client(port)
    try:
        return await client.ask(kind, body, pause)
    finally:
        client.close()


async def load(
    port: int, bodies: list[tuple[str, bytes]], clients: int, seconds: float, pid: int | None = None
) -> dict:
    """Let `clients` ask again and again: {"statuses", "times" of captions in seconds, "memory" in MB}.

    Every second client keeps its connection.
    """
    statuses: collections.Counter[int | str] = collections.Counter()
    times: list[float] = []
    until = time.monotonic() + seconds

    async def asking(number: int) -> None:
        client, keep = Client(port), number % 2 == 0
        while time.monotonic() < until:
            began = time.monotonic()
            status, _ = await client.ask(*bodies[number % len(bodies)], keep=keep)
            statuses[status] += 1
            if status == 200:
                times.append(time.monotonic() - began)
            elif status == 503:
                await asyncio.sleep(1.0)
            number += 1
        client.close()

    async def watched() -> list[float]:
        memory = []
        while pid and time.monotonic() < until:
            memory.append(_megabytes(pid))
            await asyncio.sleep(max(seconds / 20, 0.1))
        return memory

    memory, *_ = await asyncio.gather(watched(), *(asking(number) for number in range(clients)))
    return {"statuses": dict(statuses), "times": sorted(times), "memory": memory}


def _megabytes(pid: int) -> float:
    """The resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    bodies = [multipart(photo.read_bytes()) for photo in args.photos]
    found = asyncio.run(load(args.port, bodies, args.clients, args.seconds, args.pid))
    times, memory = found["times"], found["memory"]
    for status, count in sorted(found["statuses"].items(), key=lambda item: -item[1]):
        print(f"{count:7,}  {status}")
    if times:
        print(f"captions: {len(times) / args.seconds:.1f} a second, median {times[len(times) // 2]:.2f} s,", end=" ")
        print(f"slowest {times[-1]:.2f} s")
    print("memory, MB:", " ".join(f"{value:.0f}" for value in memory))


if __name__ == "__main__":
    main()
