from __future__ import annotations

from runner.workload import ClaimSize


def test_a_fast_run_claims_more_at_a_time_and_a_slow_one_no_more_than_its_slots() -> None:
    now = 0.0
    size = ClaimSize(32, clock=lambda: now)
    sizes = []
    for lasted in (0.1, 0.1, 0.1, 0.1, 0.5, 5, 5, 5, 5):
        sizes.append(size.next())
        now += lasted
    assert sizes == [32, 64, 128, 256, 256, 256, 128, 64, 32]


def test_a_claim_is_never_larger_than_a_transaction_should_be() -> None:
    assert ClaimSize(5000).next() == ClaimSize.MOST
