"""A slow cable between two network namespaces, for kernels without netem: `cable.py SPACE SPACE SECONDS BITS_PER_SECOND`.

Each end is an interface eth0 (TUN) in its namespace; packets go from one to the other after so many seconds, and no faster
than so many bits a second. Packets are up to 64 KiB, as the kernel hands them to a virtual network card, while TCP's
segments stay as small as on a real cable. It runs until it is killed.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import select
import struct
import sys
import time

NAME, MTU = "eth0", 1500
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_PACKET_INFO, _WITH_HEADER = 0x0001, 0x1000, 0x4000
_CHECKSUMS_AND_BIG_PACKETS = 0x01 | 0x02 | 0x04


def open_end(space: str) -> int:
    """The file of an interface in a namespace, which this thread enters for it."""
    with open(f"/run/netns/{space}") as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {space}")
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", NAME.encode(), _TUN | _NO_PACKET_INFO | _WITH_HEADER))
    fcntl.ioctl(end, _TUNSETOFFLOAD, _CHECKSUMS_AND_BIG_PACKETS)
    return end


def carry(ends: tuple[int, int], delay_s: float, bits_per_s: float) -> None:
    """For ever."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    on_the_way: dict[int, collections.deque[tuple[float, bytes]]] = {end: collections.deque() for end in ends}
    free_from = dict.fromkeys(ends, 0.0)
    while True:
        due = min((queue[0][0] for queue in on_the_way.values() if queue), default=time.monotonic() + 1.0)
        readable, _, _ = select.select(ends, [], [], max(0.0, due - time.monotonic()))
        now = time.monotonic()
        for end in readable:
            try:
                packet = os.read(end, 70000)
            except BlockingIOError:
                continue
            free_from[end] = max(now, free_from[end]) + 8 * len(packet) / bits_per_s
            on_the_way[end].append((free_from[end] + delay_s, packet))
        for end, queue in on_the_way.items():
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # the other end is down: lost, as on a cable
                    os.write(other[end], queue.popleft()[1])


if __name__ == "__main__":
    both = (open_end(sys.argv[1]), open_end(sys.argv[2]))
    print("ready", flush=True)
    carry(both, float(sys.argv[3]), float(sys.argv[4]))
