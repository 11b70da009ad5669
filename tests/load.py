"""Many clients at once ask a captioning service: what they got, how fast, and what it cost.

    python inference.py --model_path exported --serve &
    python tests/load.py --port 7860 --pid $! --clients 200 --seconds 300 photo.jpg more.jpg

Prints how many answers there were by status, the times of those that were captions, and the memory of the service from
beginning to end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import time
from pathlib import Path


def multipart(data: bytes, fields: dict[str, str] | None = None) -> tuple[str, bytes]:
    """(content type, body) of an upload named `image`."""
    parts = [f'--x\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in (fields or {}).items()]
    parts.append('--x\r\nContent-Disposition: form-data; name="image"; filename="photo.jpg"\r\n\r\n')
    return "multipart/form-data; boundary=x", "".join(parts).encode() + data + b"\r\n--x--\r\n"


async def ask(port: int, kind: str, body: bytes, pause: float = 0.0) -> tuple[int, bytes]:
    """One `POST /caption`: (status, body); 0 where the connection broke.

    Args:
        pause: seconds between two pieces of the body, for a slow client.
    """
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = f"POST /caption HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            size = 100 if pause else len(body)
            for first in range(0, len(body), size):
                writer.write(body[first : first + size])
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)
            answer = await reader.read()
        finally:
            writer.close()
    except OSError:
        return 0, b""
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, content


async def load(
    port: int, bodies: list[tuple[str, bytes]], clients: int, seconds: float, pid: int | None = None
) -> dict:
    """Let `clients` ask again and again: {"statuses", "times" of captions, "memory" in MB}."""
    statuses: collections.Counter[int] = collections.Counter()
    times: list[float] = []
    until = time.monotonic() + seconds

    async def client(number: int) -> None:
        while time.monotonic() < until:
            began = time.monotonic()
            status, _ = await ask(port, *bodies[number % len(bodies)])
            statuses[status] += 1
            if status == 200:
                times.append(time.monotonic() - began)
            elif status == 503:
                await asyncio.sleep(1.0)
            number += 1

    async def watched() -> list[float]:
        memory = []
        while pid and time.monotonic() < until:
            memory.append(_megabytes(pid))
            await asyncio.sleep(max(seconds / 20, 0.1))
        return memory

    memory, *_ = await asyncio.gather(watched(), *(client(number) for number in range(clients)))
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
    print("answers by status:", found["statuses"])
    if times:
        print(f"captions: {len(times) / args.seconds:.1f} a second, median {times[len(times) // 2]:.2f} s,", end=" ")
        print(f"slowest {times[-1]:.2f} s")
    print("memory, MB:", " ".join(f"{value:.0f}" for value in memory))


if __name__ == "__main__":
    main()
