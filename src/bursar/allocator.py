"""CUDA's caching allocator, replayed: what it holds for a stream of allocations and frees.

Requests are rounded to 512 B. Up to 1 MiB they come from 2 MiB segments, up to 10 MiB from 20 MiB segments, above that
from segments of their own rounded to 2 MiB; the best-fitting free block is split and freed neighbours merge
(c10/cuda/CUDACachingAllocator.cpp, without expandable segments). One stream; segments are never given back, as torch
does unless it runs out.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ROUND_BYTES = 512
SMALL_BYTES = 2**20
_SMALL_SEGMENT, _LARGE_SEGMENT, _LARGE_FROM = 2 * 2**20, 20 * 2**20, 10 * 2**20


class Placed(NamedTuple):
    """Where an event's block lies, its rounded size, and the size of the segment that was taken from CUDA for it.

    Addresses count from 0; segments stand one after the other as they were taken.
    """

    address: int
    n_bytes: int
    segment_bytes: int


class _Block:
    __slots__ = ("address", "free", "next", "number", "pool", "previous", "size")

    def __init__(self, number: int, size: int, pool: int, address: int) -> None:
        self.number, self.size, self.pool, self.address = number, size, pool, address
        self.next: _Block | None = None
        self.previous: _Block | None = None
        self.free = False


def reserved_bytes(events: Iterable[tuple[int, int]]) -> int:
    """Bytes of the segments held after ``events``: (storage, +bytes to allocate or -bytes to free), in order.

    >>> reserved_bytes([(0, 1), (1, 3 * 2**20)]) == 2 * 2**20 + 20 * 2**20
    True
    """
    return sum(placed.segment_bytes for placed in replay(events) if placed is not None)


def replay(events: Iterable[tuple[int, int]]) -> Iterator[Placed | None]:
    """What becomes of each of ``events``, as `reserved_bytes` takes them; None for a free of what was never allocated.

    >>> [placed.address for placed in replay([(0, 1), (1, 1), (0, -1), (2, 1)])]
    [0, 512, 0, 0]
    """
    pools: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])  # free blocks as (size, number)
    blocks: dict[int, _Block] = {}
    live: dict[int, _Block] = {}
    held = number = 0

    def give(block: _Block) -> None:
        block.free = True
        bisect.insort(pools[block.pool], (block.size, block.number))

    def take(block: _Block) -> None:
        block.free = False
        pool = pools[block.pool]
        pool.pop(bisect.bisect_left(pool, (block.size, block.number)))

    for storage, delta in events:
        if delta > 0:
            size = -(-delta // ROUND_BYTES) * ROUND_BYTES
            small = size <= SMALL_BYTES
            pool = pools[0 if small else 1]
            at = bisect.bisect_left(pool, (size, -1))
            taken = 0
            if at < len(pool):
                block = blocks[pool[at][1]]
                take(block)
            else:
                segment = (
                    _SMALL_SEGMENT
                    if small
                    else _LARGE_SEGMENT
                    if size < _LARGE_FROM
                    else -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
                )
                number += 1
                block = blocks[number] = _Block(number, segment, 0 if small else 1, held)
                held += segment
                taken = segment
            rest = block.size - size
            if rest >= ROUND_BYTES if small else rest > SMALL_BYTES:
                number += 1
                tail = blocks[number] = _Block(number, rest, block.pool, block.address + size)
                tail.previous, tail.next = block, block.next
                if block.next is not None:
                    block.next.previous = tail
                block.next, block.size = tail, size
                give(tail)
            live[storage] = block
            yield Placed(block.address, block.size, taken)
        elif storage in live:
            block = live.pop(storage)
            freed = Placed(block.address, block.size, 0)
            after = block.next
            if after is not None and after.free:
                take(after)
                block.size += after.size
                block.next = after.next
                if after.next is not None:
                    after.next.previous = block
                del blocks[after.number]
            before = block.previous
            if before is not None and before.free:
                take(before)
                before.size += block.size
                before.next = block.next
                if block.next is not None:
                    block.next.previous = before
                del blocks[block.number]
                block = before
            give(block)
            yield freed
        else:
            yield None
