"""Interleaved timing: every implementation runs once in every round, so that a noisy neighbour disturbs all alike."""

import math
import statistics
import time
from collections.abc import Mapping

import numpy as np

from .peers import Call

_SECONDS_PER_SAMPLE = {"cpu": 0.02, "gpu": 0.1}


def measure(calls: Mapping[str, Call], rounds: int, on_gpu: bool) -> dict[str, list[float]]:
    """Seconds per call, one sample per round, of calls that have been run before (compiled).

    On a GPU a sample is many calls and one wait at the end, so that the host's latency hides behind the device's work;
    and in front of it run as many, untimed: the clock follows the power that was drawn lately, which would be a
    neighbour's. It swings, and a sample of 20 ms may be off by a fifth. On a CPU every call is waited for, since XLA
    would otherwise run several at once.
    """
    seconds = _SECONDS_PER_SAMPLE["gpu" if on_gpu else "cpu"]
    # A GPU's first estimate is over some calls, since a single one is mostly the host's latency.
    counts = {name: math.ceil(seconds / _sample(call, 5 if on_gpu else 1, on_gpu)) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        # Every other round runs backwards: nobody always follows the same neighbour.
        for name in list(calls)[:: -1 if i % 2 else 1]:
            if on_gpu:
                _sample(calls[name], counts[name], on_gpu)
            else:
                time.sleep(0.01)  # OpenMP's idle threads spin for a while, and would take cores from the next one.
            samples[name].append(_sample(calls[name], counts[name], on_gpu))
    return samples


def _sample(call: Call, count: int, on_gpu: bool) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = call.run()
        if not on_gpu:
            call.wait(result)
    call.wait(result)
    return (time.perf_counter() - start) / count


def median_and_spread(samples: list[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles as a fraction of it."""
    median = statistics.median(samples)
    low, high = np.percentile(samples, [25, 75])
    return median, float(high - low) / median
