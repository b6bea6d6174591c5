"""A process that stands for a slow or lossy cable: it forwards frames between two tap devices.

    python relay.py NEAR FAR BITS_PER_S DELAY_S LOSS SEED

creates both devices, prints "ready", and ends when its standard input is closed. It stands in for
the queue ``netem`` where the kernel has none, and imports nothing but the standard library.
"""

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_FRAME_BYTES = 65536
_QUEUE_BYTES = 1 << 20  # what waits beyond this is dropped, as by a switch
_BATCH = 64  # frames read in one go, so that both directions get their turn


@dataclass(kw_only=True)
class Lane:
    """One direction of the cable.

    Attributes:
        rate: bits per second; 0 for no limit. delay: seconds. loss: part of the frames lost.
        random: decides which.
        lost: frames that were dropped so far.
    """

    rate: float
    delay: float
    loss: float
    random: random.Random
    lost: int = 0
    _free_at: float = 0.0
    _waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    _bytes: int = 0

    def push(self, now: float, frame: bytes) -> None:
        """A frame enters at time `now`, in seconds."""
        if self.random.random() < self.loss or self._bytes + len(frame) > _QUEUE_BYTES:
            self.lost += 1
            return
        seconds = len(frame) * 8 / self.rate if self.rate else 0.0
        self._free_at = max(now, self._free_at) + seconds
        self._waiting.append((self._free_at + self.delay, frame))
        self._bytes += len(frame)

    def pop(self, now: float) -> bytes | None:
        """The next frame that has arrived by `now`, if there is one."""
        if not self._waiting or self._waiting[0][0] > now:
            return None
        _, frame = self._waiting.popleft()
        self._bytes -= len(frame)
        return frame

    def next_at(self) -> float | None:
        """When the next frame arrives."""
        return self._waiting[0][0] if self._waiting else None


def open_tap(name: str) -> int:
    """Creates a tap device; returns its file. The device lasts as long as the file is open."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def forward(near: int, far: int, lanes: tuple[Lane, Lane]) -> None:
    """Forwards frames until standard input is closed: ``lanes[0]`` from near to far."""
    routes = ((near, far, lanes[0]), (far, near, lanes[1]))
    while True:
        due = [at for lane in lanes if (at := lane.next_at()) is not None]
        timeout = max(0.0, min(due) - time.monotonic()) if due else None
        ready, _, _ = select.select([0, near, far], [], [], timeout)
        if 0 in ready:
            return
        for source, target, lane in routes:
            if source in ready:
                _read(source, lane)
            while (frame := lane.pop(time.monotonic())) is not None:
                _write(target, frame)


def _read(tap: int, lane: Lane) -> None:
    for _ in range(_BATCH):
        try:
            frame = os.read(tap, _FRAME_BYTES)
        except OSError:  # nothing more, or the device is down
            return
        lane.push(time.monotonic(), frame)


def _write(tap: int, frame: bytes) -> None:
    try:
        os.write(tap, frame)
    except OSError:  # the device is down: the frame is lost, as on a cable without a peer
        return


def main(near: str, far: str, rate: str, delay: str, loss: str, seed: str) -> None:
    """Runs the command of this module."""
    taps = open_tap(near), open_tap(far)
    lanes = tuple(
        Lane(
            rate=float(rate),
            delay=float(delay),
            loss=float(loss),
            random=random.Random(int(seed) * 2 + way),
        )
        for way in range(2)
    )
    print("ready", flush=True)
    forward(*taps, (lanes[0], lanes[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
