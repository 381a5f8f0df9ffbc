"""The caching allocator's replay: hand cases from its source, and a slow allocator of linked blocks beside it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bursar.allocator import Held, replay, reserved_bytes

KiB, MiB = 2**10, 2**20


def held(*events, **options):
    """Of (storage, +bytes or -bytes), in order."""
    table = np.array(events, np.int64).reshape(-1, 2)
    return replay(table[:, 0], table[:, 1], **options)


# ---- hand cases


def test_a_byte_is_512_and_takes_a_segment_of_two_mebibytes():
    assert held((0, 1)) == Held(allocated_bytes=512, reserved_bytes=2 * MiB, segments=1)


def test_up_to_a_mebibyte_is_small_and_a_byte_more_is_not():
    assert held((0, MiB)).reserved_bytes == 2 * MiB
    assert held((0, MiB + 1)).reserved_bytes == 20 * MiB


def test_below_ten_mebibytes_shares_a_segment_of_twenty_and_from_there_on_has_its_own():
    assert held((0, 10 * MiB - 512), (1, 9 * MiB)).reserved_bytes == 20 * MiB
    assert held((0, 10 * MiB), (1, 10 * MiB)) == Held(20 * MiB, 20 * MiB, 2)
    assert held((0, 11 * MiB)).reserved_bytes == 12 * MiB


def test_a_rest_of_a_mebibyte_or_less_stays_with_a_large_block_and_counts_as_allocated():
    assert held((0, 11 * MiB)).allocated_bytes == 12 * MiB
    assert held((0, 10 * MiB + 512)).allocated_bytes == 10 * MiB + 512  # 12 MiB less that is over a mebibyte: split off
    assert held((0, 11 * MiB), (0, -11 * MiB), (1, 11 * MiB)).allocated_bytes == 12 * MiB


def test_a_small_block_is_split_down_to_512():
    assert held(*((i, 512) for i in range(4096))) == Held(2 * MiB, 2 * MiB, 1)
    assert held(*((i, 512) for i in range(4097))).segments == 2


def test_the_smallest_block_that_fits_is_taken():
    a, b, c = 12 * MiB, 14 * MiB, 16 * MiB
    made = [(0, c), (1, a), (2, b), (0, -c), (1, -a), (2, -b)]
    assert held(*made, (3, b), (4, a), (5, c)).segments == 3  # each in the block of its size
    assert held(*made, (3, 13 * MiB), (4, c), (5, a)).segments == 3  # 13 goes to 14, not to 16


def test_of_equal_blocks_the_one_at_the_lowest_address_is_taken():
    fill = [(i, 256 * KiB) for i in range(8)]
    freed = [(0, -256 * KiB), (2, -256 * KiB), (4, -256 * KiB), (5, -256 * KiB)]
    # A fits in the holes 0, 2 and 4-5: in 0, which leaves 4-5 whole for half a mebibyte
    assert held(*fill, *freed, (8, 256 * KiB), (9, 512 * KiB)).segments == 1


def test_freed_neighbours_merge_on_both_sides():
    three = [(0, MiB // 2), (1, MiB // 2), (2, MiB)]
    assert held(*three, (0, -MiB // 2), (1, -MiB // 2), (3, MiB)).segments == 1
    assert held(*three, (1, -MiB // 2), (0, -MiB // 2), (3, MiB)).segments == 1
    assert held(*three, (0, -MiB // 2), (2, -MiB), (3, MiB + 512)).segments == 2  # apart; and large is another pool


def test_pools_do_not_lend_to_each_other():
    assert held((0, 3 * MiB), (0, -3 * MiB), (1, 1)).reserved_bytes == 20 * MiB + 2 * MiB


def test_streams_do_not_lend_to_each_other():
    events = np.array([(0, 4 * MiB), (0, -4 * MiB), (1, 4 * MiB)])
    alone = replay(events[:, 0], events[:, 1])
    apart = replay(events[:, 0], events[:, 1], np.array([0, 0, 7]))
    assert (alone.reserved_bytes, apart.reserved_bytes) == (20 * MiB, 40 * MiB)
    assert alone.allocated_bytes == apart.allocated_bytes == 4 * MiB


def test_what_is_resized_in_place_stands_twice_for_a_moment():
    assert held((0, 12 * MiB), (0, 2 * MiB)) == Held(26 * MiB, 26 * MiB, 2)
    assert held((0, 12 * MiB), (0, -12 * MiB), (0, 12 * MiB)) == Held(12 * MiB, 12 * MiB, 1)  # FSDP's resize_ to 0


def test_a_segment_that_expands_grows_by_pages_and_leaves_no_rest_behind():
    grown = held((0, 11 * MiB), (1, 30 * MiB), expandable_segments=True)
    assert grown == Held(41 * MiB, 60 * MiB, 2)  # 20, and 40 more for the 21 that the rest of 9 lacks: pages of 20
    assert held((0, 11 * MiB), (1, 30 * MiB)).reserved_bytes == 12 * MiB + 30 * MiB
    assert held((0, 1), expandable_segments=True).reserved_bytes == 2 * MiB


def test_the_end_of_an_expanding_segment_is_kept_for_last():
    a, b = 2 * MiB, 4 * MiB
    made = [(0, b), (1, a), (0, -b)]  # a hole of 4 MiB, a block, an end of 14 MiB
    # 14 MiB would grow the segment were the end spent on 3 MiB
    assert held(*made, (2, 3 * MiB), (3, 14 * MiB), expandable_segments=True).reserved_bytes == 20 * MiB


def test_nothing_allocated_holds_nothing():
    assert held() == held((0, 0)) == held((0, -5)) == Held(0, 0, 0)
    assert reserved_bytes([]) == 0


# ---- a slow allocator: blocks in a list, searched and sorted anew each time


class Slow:
    """c10's allocator word for word, as far as no memory runs out."""

    def __init__(self, expandable):
        self.expandable = expandable
        self.segments = {}  # name -> blocks in order: [address, bytes, free, mapped]
        self.pools = {}  # name -> (stream, small)
        self.live = {}
        self.top = self.reserved = self.allocated = self.peak = self.made = 0

    def allocate(self, storage, n_bytes, stream):
        size = max(512, -(-n_bytes // 512) * 512)
        small = size <= MiB
        pool = (stream, small)
        name, block = self.find(pool, size) or self.grow(pool, size, small)
        rest = block[1] - size
        if rest >= 512 if small or self.expandable else rest > MiB:
            blocks = self.segments[name]
            blocks.insert(blocks.index(block) + 1, [block[0] + size, rest, True, True])
            block[1] = size
        block[2] = False
        self.live[storage] = name, block
        self.allocated += block[1]
        self.peak = max(self.peak, self.allocated)

    def find(self, pool, size):
        fitting = [
            (block[1], block[0], name, block, self.room(name, block))
            for name, blocks in self.segments.items()
            if self.pools[name] == pool
            for block in blocks
            if block[2] and block[3] and block[1] >= size
        ]
        fitting.sort(key=lambda f: f[:2])
        i = 0
        while self.expandable and i + 1 < len(fitting) and fitting[i + 1][4] < fitting[i][4]:
            i += 1
        return fitting[i][2:4] if fitting else None

    def room(self, name, block):
        """Its size, and that of the unmapped block after it."""
        blocks = self.segments[name]
        following = blocks[blocks.index(block) + 1 :][:1]
        return block[1] + (following[0][1] if following and not following[0][3] else 0)

    def grow(self, pool, size, small):
        self.made += 1
        if not self.expandable:
            length = 2 * MiB if small else 20 * MiB if size < 10 * MiB else -(-size // (2 * MiB)) * 2 * MiB
            self.segments[self.made], self.pools[self.made] = [[self.top, length, True, True]], pool
            self.top += length
            self.reserved += length
            return self.made, self.segments[self.made][0]
        blocks = self.segments.setdefault(pool, [[2**50 * (1 + len(self.segments)), 2**45, True, False]])
        self.pools[pool] = pool
        unmapped = blocks[-1]
        before = blocks[-2] if len(blocks) > 1 and blocks[-2][2] else None
        page = 2 * MiB if small else 20 * MiB
        more = -(-(size - (before[1] if before else 0)) // page) * page
        self.reserved += more
        if before:
            before[1] += more
        else:
            before = [unmapped[0], more, True, True]
            blocks.insert(len(blocks) - 1, before)
        unmapped[0] += more
        unmapped[1] -= more
        return pool, before

    def free(self, storage):
        name, block = self.live.pop(storage)
        self.allocated -= block[1]
        block[2] = True
        blocks = self.segments[name]
        i = blocks.index(block)
        for j in (i + 1, i):  # what comes after, then what comes before
            if 0 < j < len(blocks) and blocks[j - 1][2] and blocks[j][2] and blocks[j - 1][3] and blocks[j][3]:
                blocks[j - 1][1] += blocks.pop(j)[1]

    def run(self, events, streams):
        for storage, delta in events:
            if delta > 0:
                self.allocate(storage, delta, streams[storage])
            else:
                self.free(storage)
        return Held(self.peak, self.reserved, self.made)


def random_trace(seed, n=250):
    """Allocations and frees in a random order, of sizes that recur and sizes that do not."""
    draw = random.Random(seed)
    some = [
        draw.choice([1, draw.randrange(1, 5000), draw.randrange(1, MiB), draw.randrange(MiB, 12 * MiB),
                     draw.randrange(9 * MiB, 30 * MiB)])
        for _ in range(10)
    ]  # fmt: skip
    live, events = {}, []
    for storage in range(n):
        if live and draw.random() < 0.47:
            gone = draw.choice(list(live))
            events.append((gone, -live.pop(gone)))
        size = draw.choice(some) if draw.random() < 0.8 else draw.randrange(1, 25 * MiB)
        live[storage] = size
        events.append((storage, size))
    while live and draw.random() < 0.95:
        gone = draw.choice(list(live))
        events.append((gone, -live.pop(gone)))
    return events, {s: draw.randrange(2) for s in range(n)}


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("two_streams", [False, True])
def test_the_replay_equals_the_slow_allocator_on_random_traces(expandable, two_streams):
    for seed in range(12):
        events, stream = random_trace(seed)
        stream = stream if two_streams else dict.fromkeys(stream, 0)
        of_events = np.array([stream[s] for s, _ in events])
        fast = held(*events, streams=of_events if two_streams else None, expandable_segments=expandable)
        assert fast == Slow(expandable).run(events, stream), f"seed {seed}"


def test_a_slow_allocator_with_another_rule_would_differ():
    """Worst fit for best fit: the comparison sees it."""

    class Worst(Slow):
        def find(self, pool, size):
            found = [(b[1], n, b) for n, blocks in self.segments.items() if self.pools[n] == pool for b in blocks
                     if b[2] and b[1] >= size]  # fmt: skip
            return max(found, key=lambda f: f[0])[1:] if found else None

    assert any(held(*events) != Worst(False).run(events, stream) for events, stream in map(random_trace, range(4)))


def test_storages_in_any_numbers_and_in_pieces_come_to_the_same():
    events, _ = random_trace(3)
    shifted = [(s * 10**9 - 5, delta) for s, delta in events]  # no table by number: sorted instead
    assert held(*shifted) == held(*events)
    reused = [(0, 3 * MiB), (0, -3 * MiB)] * 5
    assert held(*reused) == held(*((i // 2, delta) for i, (_, delta) in enumerate(reused)))
