"""What ranks hold and send: the ZeRO paper's table, and parts that add up to the whole."""

from __future__ import annotations

import pytest

from bursar.architecture import Transformer, preset
from bursar.network import all_gather_bytes, all_reduce_bytes, data_parallel_ranks, zero_bytes

# Rajbhandari et al. 2020, table 1, 7.5B parameters: GB of a rank at stages 1, 2 and 3.
ZERO_TABLE_1 = {
    1: (120, 120, 120),
    4: (52.5, 41.25, 30),
    16: (35.625, 21.5625, 7.5),
    64: (31.406, 16.641, 1.875),
    256: (30.352, 15.410, 0.469),
    1024: (30.088, 15.103, 0.117),
}


@pytest.mark.parametrize("ranks", ZERO_TABLE_1)
def test_model_states_of_a_rank_are_those_of_the_zero_paper(ranks):
    found = [7.5 * zero_bytes(stage, ranks) for stage in (1, 2, 3)]  # 7.5e9 parameters in GB of 1e9 bytes
    assert found == pytest.approx(ZERO_TABLE_1[ranks], abs=5e-4)


def test_stage_0_and_one_rank_shard_nothing():
    assert [zero_bytes(0, n) for n in (1, 2, 64)] == [16, 16, 16]
    assert [zero_bytes(stage, 1) for stage in range(4)] == [16, 16, 16, 16]


def test_the_shards_of_stage_3_add_up_to_the_whole():
    assert 64 * zero_bytes(3, 64) == zero_bytes(0, 1)


def test_a_stage_that_zero_does_not_have_is_refused():
    with pytest.raises(ValueError, match="ZeRO has stages 0 to 3, not 4"):
        zero_bytes(4, 8)


def test_the_activations_of_a_layer_are_korthikantis_34_and_5as_over_h():
    shape = preset("gpt3-175b")
    assert isinstance(shape, Transformer)
    rest, scores = shape.published_activation_bytes(1, 2048)
    assert rest == 34 * 2048 * 12288
    assert scores / (2048 * 12288) == 5 * 96 * 2048 / 12288 == 80
    published = preset("gpt3-6.7b", T=2048).published_activation_bytes(1, 2048)  # h = 4096, a = 32
    assert sum(published) == 956_301_312


def test_a_ring_sends_all_but_its_own_shard():
    assert [all_gather_bytes(n, 1600) for n in (1, 2, 4, 16)] == [0, 800, 1200, 1500]


def test_data_parallel_is_bound_by_compute_up_to_its_limit_and_not_beyond():
    B, W, C, P = 2**20, 50e9, 989.4e12, 10**9
    n = data_parallel_ranks(B, W, C)
    assert n == 53  # 1 + 2^20 · 50e9 / 989.4e12 = 53.99

    def hidden(ranks):
        return 4 * P * B / ranks / C >= all_reduce_bytes(ranks, 2 * P) / W

    assert hidden(n)
    assert not hidden(n + 1)
