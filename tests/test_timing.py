"""Timing: statistics of known samples, turns, repeats, and a slowdown that must show."""

import pytest

from mnet_kernels.timing import (
    LONG_CALL_S,
    MAX_ROUNDS,
    MIN_ROUNDS,
    Spread,
    environment,
    interleave,
    ratio,
    verdict,
)


class Clock:
    """A clock that stands still but for what the candidates spend."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):
        """A candidate that spends the given times in turn, over and over."""
        spent = 0

        def run() -> None:
            nonlocal spent
            self.log.append(name)
            self.now += seconds[spent % len(seconds)]
            spent += 1

        return run


def test_spread_of_known_samples():
    spread = Spread((5.0, 1.0, 2.0, 4.0, 3.0, 6.0))
    assert (spread.median, spread.low, spread.high) == (3.5, 2.0, 5.0)
    assert spread.summary(unit=0.5) == {"median": 7.0, "p20": 4.0, "p80": 10.0, "rounds": 6}


def test_spread_of_one_sample_is_that_sample():
    spread = Spread((2.0,))
    assert (spread.median, spread.low, spread.high) == (2.0, 2.0, 2.0)


def test_spread_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="samples: expected at least one"):
        Spread(())


def test_ratio_is_taken_within_a_round():
    # The machine got three times slower in the last rounds; the candidates' ratio did not.
    slow, fast = Spread((2.0, 2.0, 6.0, 6.0)), Spread((1.0, 1.0, 3.0, 3.0))
    assert ratio(slow, fast).samples == (2.0, 2.0, 2.0, 2.0)


def test_ratio_of_different_rounds_is_an_error():
    with pytest.raises(ValueError, match="same rounds, got 2 and 1"):
        ratio(Spread((1.0, 1.0)), Spread((1.0,)))


def test_samples_are_seconds_a_call_in_round_order():
    clock = Clock()
    # Two calls warm up and one estimates: the fourth is the first that counts.
    call = clock.call("a", 9.0, 9.0, 9.0, 1.0, 2.0, 3.0)
    spreads = interleave({"a": call}, rounds=3, clock=clock)
    assert spreads["a"].samples == (1.0, 2.0, 3.0)


def test_candidates_take_turns_and_nobody_always_has_the_same_neighbour():
    clock = Clock()
    calls = {name: clock.call(name, 1.0) for name in "abcd"}
    interleave(calls, rounds=40, clock=clock)
    turns = "".join(clock.log)[len("aaabbbcccddd") :]
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert all(sorted(one) == list("abcd") for one in rounds) and len(rounds) == 40
    for name in "abcd":
        before = [one[one.index(name) - 1] for one in rounds if one[0] != name]
        assert all(before.count(other) > 3 for other in "abcd" if other != name)
        assert 3 < len(rounds) - len(before) < 20  # goes first


def test_short_calls_are_repeated_until_the_clock_can_see_them():
    clock = Clock()
    spreads = interleave(
        {"short": clock.call("s", 0.25), "long": clock.call("l", 4.0)},
        rounds=2,
        min_sample_s=1.0,
        clock=clock,
    )
    assert clock.log.count("s") == 3 + 4 + 2 * 4
    assert clock.log.count("l") == 3 + 2
    assert spreads["short"].samples == (0.25, 0.25)


def test_one_slow_call_does_not_make_samples_short():
    clock = Clock()
    call = clock.call("s", 1.0, 1.0, 5.0, *[0.25] * 60)  # the third met somebody's threads
    interleave({"short": call}, rounds=2, min_sample_s=10.0, clock=clock)
    assert len(clock.log) == 3 + 2 + 2 * 40


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1.0, 20), (1000.0, MIN_ROUNDS), (0.001, MAX_ROUNDS)]
)
def test_rounds_follow_the_budget_within_bounds(seconds, expected):
    clock = Clock()
    spreads = interleave({"a": clock.call("a", seconds)}, budget_s=20.0, clock=clock)
    assert len(spreads["a"].samples) == expected


def test_a_turn_begins_with_a_pause_and_calls_that_do_not_count():
    clock = Clock()
    pause = LONG_CALL_S / 8

    def sleep(seconds: float) -> None:
        clock.log.append("_")
        clock.now += seconds

    short, long = LONG_CALL_S / 4, LONG_CALL_S * 4
    spreads = interleave(
        {"s": clock.call("s", short), "l": clock.call("l", long)},
        rounds=2, settle_s=pause, clock=clock, sleep=sleep,
    )  # fmt: skip
    assert "".join(clock.log) == "ssslll" + "_ssl" + "l_ss"
    assert spreads["s"].samples == pytest.approx((short, short))
    assert spreads["l"].samples == pytest.approx((long, long))

    clock.log.clear()
    interleave(
        {"s": clock.call("s", short)},
        rounds=1, min_sample_s=1.5 * short, settle_s=pause, clock=clock, sleep=sleep,
    )  # fmt: skip
    assert "".join(clock.log) == "sss" + "ss" + "_ssss"


def test_pauses_count_towards_the_budget():
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds

    short = LONG_CALL_S / 2
    spreads = interleave(
        {"s": clock.call("s", short)}, budget_s=20.5 * 4 * short, settle_s=2 * short, clock=clock,
        sleep=sleep,
    )  # fmt: skip
    assert len(spreads["s"].samples) == 20


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ((1.2, 1.3, 1.1, 1.2, 1.2, 0.5), "faster"),  # one round of six went wrong
        ((0.8, 0.7, 0.9, 0.8, 0.8, 2.0), "slower"),
        ((1.4, 1.3, 1.3, 0.9, 0.8), "noise"),  # the median alone would claim 1.3x
        ((1.0, 1.0, 1.0, 1.0, 1.0), "noise"),
    ],
)
def test_a_claim_needs_four_fifths_of_the_rounds(samples, expected):
    assert verdict(Spread(samples)) == expected


def test_a_planted_slowdown_shows_through_a_drifting_machine():
    # Both get 4 times slower over the rounds, one is 10 % slower: only turns can tell.
    clock = Clock()
    speed = iter(1 + number / 20 for number in range(200))

    def candidate(cost: float):
        def run() -> None:
            clock.now += cost * next(speed)

        return run

    calls = {"base": candidate(1.0), "slower": candidate(1.1)}
    spreads = interleave(calls, rounds=30, clock=clock)
    assert spreads["base"].high > 1.5 * spreads["base"].low
    assert verdict(ratio(spreads["base"], spreads["slower"])) == "slower"


def test_the_device_is_waited_for_before_the_clock_is_read():
    clock = Clock()
    spreads = interleave(
        {"a": clock.call("a", 1.0)},
        rounds=1,
        synchronize=clock.call("wait", 0.5),
        clock=clock,
    )
    assert spreads["a"].samples == (1.5,)


def test_progress_ends_at_one():
    told = []
    interleave({"a": lambda: None}, rounds=4, on_round=told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_environment_names_what_a_measurement_depends_on():
    facts = environment()
    assert {"date", "commit", "torch", "cpu", "instruction_set", "threads"} <= facts.keys()
    assert facts["threads"] >= 1
