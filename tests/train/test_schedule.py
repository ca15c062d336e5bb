import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.trial_run import cosine_with_warmup, global_batches, micro_batches_of_rank, steps_per_epoch


@given(st.integers(1, 200), st.integers(1, 17), st.integers(0, 5), st.integers(1, 3))
def test_an_epoch_sees_every_sample_once(num, size, seed, epoch):
    found = global_batches(num, size, seed, epoch)
    assert sorted(i for batch in found for i in batch) == list(range(num))
    assert len(found) == steps_per_epoch(num, size)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
def test_ranks_share_a_batch_without_loss_and_meet_equally_often(num, micro, world):
    whole = list(range(num))
    shares = [micro_batches_of_rank(whole, micro_batch_size=micro, world_size=world, rank=r) for r in range(world)]
    assert sorted(i for share in shares for part in share for i in part) == whole
    assert len({len(share) for share in shares}) == 1
    assert all(len(part) <= micro for share in shares for part in share)


def test_epochs_and_seeds_differ():
    assert global_batches(50, 5, 0, 1) != global_batches(50, 5, 0, 2) != global_batches(50, 5, 1, 2)


def test_the_order_is_fixed_for_good():
    # a change here changes every number that was ever printed
    assert global_batches(10, 5, 0, 1) == global_batches(10, 5, 0, 1)


def test_the_schedule_warms_up_and_falls_to_nothing():
    factors = [cosine_with_warmup(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0) == max(factors)
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[-1] < 0.001
