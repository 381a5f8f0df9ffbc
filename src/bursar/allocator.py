"""CUDA's caching allocator, replayed: what it hands out and what it holds for a stream of allocations and frees.

A request is rounded to 512 B. Up to 1 MiB it comes from the small pool, whose segments are 2 MiB; above that from the
large pool: a segment of 20 MiB for requests below 10 MiB, else one of its own rounded to 2 MiB. The smallest free block
that is large enough is taken, of those the one at the lowest address; what is left of it is split off (from 512 B on in
the small pool, above 1 MiB in the large one, else it stays with the block and counts as allocated), and neighbours that
are free merge. With expandable segments a pool is one segment that grows by pages of 2 MiB, or 20 MiB for the large
pool, and every rest is split off; the block at its end is taken last.

Source: c10/cuda/CUDACachingAllocator.cpp, torch 2.5 to 2.13 (malloc, get_free_block, should_split, free_block,
try_allocate_expandable_block). Free memory is never given back, as torch does unless it runs out. Streams have pools of
their own. Addresses of segments are taken to rise in the order they are made; ties between equal blocks hang on it.

Pools do not touch each other, so each is replayed alone, in one loop over rounded sizes. Free blocks of one size are a
heap of addresses; a block that was merged or taken leaves a stale entry there, which is passed over when it comes up.
Sizes recur, so most requests find their bin at once: a million events a second (benchmarks/allocator.md).
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

ROUND_BYTES = 512
SMALL_BYTES = 2**20
SMALL_SEGMENT, LARGE_SEGMENT, LARGE_FROM = 2 * 2**20, 20 * 2**20, 10 * 2**20
_LARGE_POOL = 2**44  # where `placements` lets it begin
_BITS = 30  # of a block's number within its key, its address above them
_BLOCK = 2**_BITS - 1


@dataclass(frozen=True, slots=True)
class Held:
    """What the allocator shows after a stream of events, in bytes."""

    allocated_bytes: int  # the most handed out at once, as `torch.cuda.max_memory_allocated`
    reserved_bytes: int  # what it holds, as `torch.cuda.max_memory_reserved`
    segments: int  # how many times it asked the driver


def reserved_bytes(events: Iterable[tuple[int, int]]) -> int:
    """Bytes of the segments held after ``events``: (storage, +bytes to allocate or -bytes to free), in order.

    >>> reserved_bytes([(0, 1), (1, 3 * 2**20)]) == 2 * 2**20 + 20 * 2**20
    True
    """
    import numpy as np

    table = np.array(list(events), np.int64).reshape(-1, 2)
    return replay(table[:, 0], table[:, 1]).reserved_bytes


def replay(
    storages: np.ndarray,
    deltas: np.ndarray,
    streams: np.ndarray | None = None,
    *,
    expandable_segments: bool = False,
) -> Held:
    """Replay events in order: ``deltas[i]`` bytes more or fewer of ``storages[i]``, on ``streams[i]``.

    A storage that grows or shrinks in place is allocated anew, then the old one freed, as ``resize_`` does; a free of
    what was never allocated is passed over. The stream is the one of the allocation.
    """
    import numpy as np

    signed, numbers, order = _requests(np.asarray(storages), np.asarray(deltas))
    if not len(signed):
        return Held(0, 0, 0)
    allocates = signed > 0
    sizes = (np.abs(signed) + (ROUND_BYTES - 1)) & -ROUND_BYTES
    group = (sizes > SMALL_BYTES).astype(np.int64)
    sizes = np.where(allocates, sizes, -sizes)
    n = int(np.count_nonzero(allocates))
    if streams is not None:
        _, stream = np.unique(np.asarray(streams)[order], return_inverse=True)
        of = np.empty(n, np.int64)
        of[numbers[allocates]] = stream[allocates]
        group += 2 * of[numbers]
    slack: dict[int, int] = {}  # by allocation: what its block has above the request
    held = segments = 0
    for g in np.flatnonzero(np.bincount(group)).tolist():
        here = group == g
        its = numbers[here].tolist(), sizes[here].tolist(), n, g % 2 == 0
        if expandable_segments:
            more, count = _expandable(*its)
            held, segments = held + more, segments + count
            continue
        made, unsplit, _ = _segments(*its)
        held, segments = held + sum(n_bytes for _, _, n_bytes in made), segments + len(made)
        slack.update(unsplit)
    if slack:
        above = np.zeros(n, np.int64)
        above[list(slack)] = list(slack.values())
        sizes += np.where(allocates, above[numbers], -above[numbers])
    return Held(int(np.cumsum(sizes).max()), held, segments)


class Placed(NamedTuple):
    """One request in order: the event it belongs to, bytes asked for or (negative) given back, and where its block is.

    Addresses count from 0 in each of the two pools; the large one begins far above the small.
    """

    event: int
    asked_bytes: int
    address: int
    n_bytes: int  # rounded
    segment: tuple[int, int] | None  # address and bytes of the segment that was taken from CUDA for it


def placements(storages: np.ndarray, deltas: np.ndarray) -> list[Placed]:
    """Where each request of a stream of events lies, as `replay` takes them on one stream.

    >>> import numpy as np
    >>> [p.address for p in placements(np.array([0, 1, 0, 2]), np.array([1, 1, -1, 1]))]
    [0, 512, 0, 0]
    """
    import numpy as np

    signed, numbers, order = _requests(np.asarray(storages), np.asarray(deltas))
    rounded = (np.abs(signed) + (ROUND_BYTES - 1)) & -ROUND_BYTES
    n = int((signed > 0).sum())
    address = np.zeros(n, np.int64)
    segment: dict[int, tuple[int, int]] = {}
    for base, here in ((0, rounded <= SMALL_BYTES), (_LARGE_POOL, rounded > SMALL_BYTES)):
        its, sizes = numbers[here], np.where(signed > 0, rounded, -rounded)[here]
        made, _, (block, key) = _segments(its.tolist(), sizes.tolist(), n, base == 0)
        mine = np.unique(its)
        address[mine] = base + (np.array(key, np.int64)[np.array(block, np.int64)[mine]] >> _BITS) * ROUND_BYTES
        segment |= {number: (base + at, n_bytes) for number, at, n_bytes in made}
    return [
        Placed(event, asked, int(address[number]), size, segment.get(number) if asked > 0 else None)
        for event, asked, number, size in zip(
            order.tolist(), signed.tolist(), numbers.tolist(), rounded.tolist(), strict=True
        )
    ]


def _requests(storages: np.ndarray, deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes allocated (+) or freed (-) one at a time, the number of the allocation each belongs to, and its event.

    Nearly all storages come and go once, and then this is a copy; what is resized in place becomes two requests.
    """
    import numpy as np

    once = _each_once(storages, deltas)
    if once is not None:
        return once
    by_storage = np.argsort(storages, kind="stable")
    ids, changes = storages[by_storage], deltas[by_storage]
    total = np.cumsum(changes)
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.empty(0, np.int64)
    before_group = np.repeat(np.r_[0, total][starts], np.diff(np.r_[starts, len(ids)])) if len(ids) else total
    after = np.maximum(total - before_group, 0)
    before = np.maximum(after - changes, 0) if len(ids) else after
    before[starts] = 0
    before[1:] = np.where(ids[1:] == ids[:-1], after[:-1], 0)
    new = np.where(after != before, after, 0)
    old = np.where(after != before, before, 0)
    # An allocation and then a free for each event, where there is one
    sizes = np.stack([new, -old], 1).ravel()
    events = np.repeat(by_storage, 2)
    number = np.cumsum(sizes > 0) - 1
    number[1::2] -= sizes[0::2] > 0  # the free is of the allocation before this event's own
    real = np.flatnonzero(sizes)
    real = real[np.argsort(events[real], kind="stable")]
    return sizes[real], number[real], events[real]


def _each_once(storages: np.ndarray, deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The same without a sort, where each storage is allocated whole and freed whole, once; None elsewhere."""
    import numpy as np

    n = len(deltas)
    if not n or storages.min() < 0 or (many := int(storages.max()) + 1) > 8 * n + 1000:
        return None
    made, gone = np.flatnonzero(deltas > 0), np.flatnonzero(deltas < 0)
    maker = np.full(many, -1, np.int64)
    maker[storages[made]] = np.arange(len(made))
    of = maker[storages[gone]]
    if (np.bincount(storages[made], minlength=1).max() > 1 or np.bincount(storages[gone], minlength=1).max() > 1
            or (of < 0).any() or (made[of] > gone).any() or (deltas[made[of]] != -deltas[gone]).any()):  # fmt: skip
        return None
    numbers = np.empty(n, np.int64)
    numbers[made], numbers[gone] = np.arange(len(made)), of
    order = np.arange(n)
    if len(made) + len(gone) < n:
        order = np.flatnonzero(deltas)
    return deltas[order], numbers[order], order


def _segments(
    numbers: list[int], sizes: list[int], n: int, small: bool
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]], tuple[list[int], list[int]]]:
    """One pool of one stream: segments made as (allocation, address, bytes), (allocation, rest) where a block was not
    split, and the block of each allocation with the keys of blocks, which hold their addresses.

    ``numbers`` says which of ``n`` allocations an event is of. Addresses count from 0, segments stand in a row.
    """
    # Blocks by number, 0 for no block: bytes while free (else 0), neighbours, and how they stand in a bin
    room = 2 * len(sizes) + 2
    free, after, before, key = [0] * room, [0] * room, [0] * room, [0] * room
    bins: dict[int, list[int]] = {}  # free blocks by size, as heaps of keys; some stale
    known: list[int] = []  # the sizes in bins, sorted
    where = [0] * n  # by allocation: its block
    larger: dict[int, int] = {}  # by allocation: the bytes of its block, where that was not split
    unsplit: list[tuple[int, int]] = []
    segments: list[tuple[int, int, int]] = []
    made = top = 0
    least_rest = ROUND_BYTES if small else SMALL_BYTES + ROUND_BYTES
    number_of, rounded_address = _BLOCK, 2**_BITS // ROUND_BYTES
    get, push, pop, insert, find = bins.get, heapq.heappush, heapq.heappop, bisect.insort, bisect.bisect_right
    for number, size in zip(numbers, sizes, strict=True):
        if size > 0:
            heap = get(size)
            while heap:
                block = pop(heap) & number_of
                if free[block] == size:  # one of just this size
                    free[block] = 0
                    where[number] = block
                    break
            else:
                i = find(known, size)
                while i < len(known):
                    length = known[i]
                    heap = bins[length]
                    while heap:
                        block = pop(heap) & number_of
                        if free[block] == length:
                            break
                    else:
                        del known[i], bins[length]
                        continue
                    free[block] = 0
                    break
                else:
                    if small:
                        length = SMALL_SEGMENT
                    else:
                        length = LARGE_SEGMENT if size < LARGE_FROM else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
                    block = made = made + 1
                    key[block] = top * rounded_address + block
                    segments.append((number, top, length))
                    top += length
                where[number] = block
                rest = length - size
                if rest >= least_rest:
                    tail = made = made + 1
                    free[tail], before[tail], after[tail] = rest, block, after[block]
                    key[tail] = place = key[block] + size * rounded_address + tail - block
                    before[after[block]] = after[block] = tail
                    heap = get(rest)
                    if heap is None:
                        bins[rest] = [place]
                        insert(known, rest)
                    else:
                        push(heap, place)
                elif rest:
                    larger[number] = length
                    unsplit.append((number, rest))
        else:
            block = where[number]
            size = larger.pop(number, -size) if larger else -size
            other = after[block]
            if free[other]:
                size += free[other]
                free[other] = 0
                other = after[block] = after[other]
                before[other] = block
            other = before[block]
            if free[other]:
                size += free[other]
                after[other] = after[block]
                before[after[block]] = block = other
            free[block] = size
            heap = get(size)
            if heap is None:
                bins[size] = [key[block]]
                insert(known, size)
            else:
                push(heap, key[block])
    return segments, unsplit, (where, key)


def _expandable(numbers: list[int], sizes: list[int], n: int, small: bool) -> tuple[int, int]:
    """One pool of one stream as a segment that grows: its bytes, and how often it grew. Every rest is split off."""
    room = 2 * len(sizes) + 2
    free, after, before, key = [0] * room, [0] * room, [0] * room, [0] * room
    bins: dict[int, list[int]] = {}
    known: list[int] = []
    where = [0] * n
    made = top = grown = last = 0  # blocks, the end of the segment, how often it grew, its last block
    page = SMALL_SEGMENT if small else LARGE_SEGMENT
    number_of, rounded_address = _BLOCK, 2**_BITS // ROUND_BYTES
    get, push, pop, insert, find = bins.get, heapq.heappush, heapq.heappop, bisect.insort, bisect.bisect_right
    for number, size in zip(numbers, sizes, strict=True):
        if size > 0:
            heap = get(size)
            while heap:
                block = pop(heap) & number_of
                if free[block] == size and block != last:
                    free[block] = 0
                    where[number] = block
                    break
            else:
                i = find(known, size)
                while i < len(known):
                    length = known[i]
                    heap = bins[length]
                    while heap:
                        block = pop(heap) & number_of
                        if free[block] == length and block != last:
                            break
                    else:
                        del known[i], bins[length]
                        continue
                    break
                else:  # the block at the end, which could grow, comes after all that fit; it stands in no bin
                    block = last
                    length = free[block]
                    if not length:
                        block = made = made + 1
                        before[block] = last
                        key[block] = top * rounded_address + block
                        after[last] = last = block
                    more = size - length
                    if more > 0:
                        more = -(-more // page) * page
                        top, grown = top + more, grown + 1
                        length += more
                free[block] = 0
                where[number] = block
                rest = length - size
                if rest:
                    tail = made = made + 1
                    free[tail], before[tail], after[tail] = rest, block, after[block]
                    key[tail] = place = key[block] + size * rounded_address + tail - block
                    before[after[block]] = after[block] = tail
                    if block == last:
                        last = tail
                        continue
                    heap = get(rest)
                    if heap is None:
                        bins[rest] = [place]
                        insert(known, rest)
                    else:
                        push(heap, place)
        else:
            block, size = where[number], -size
            other = after[block]
            if free[other]:
                size += free[other]
                free[other] = 0
                if other == last:
                    last = block
                other = after[block] = after[other]
                before[other] = block
            other = before[block]
            if free[other]:
                size += free[other]
                after[other] = after[block]
                if block == last:
                    last = other
                before[after[block]] = block = other
            free[block] = size
            if block == last:
                continue
            heap = get(size)
            if heap is None:
                bins[size] = [key[block]]
                insert(known, size)
            else:
                push(heap, key[block])
    return top, grown
