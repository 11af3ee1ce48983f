"""Counting the bytes that torch allocates: at the peak of a call, and held after it."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(method: Callable[[], object]) -> int:
    """Most bytes allocated at one time by torch during the call, beyond those at its start (CPU allocator)."""
    method()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        method()
    now = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def held_bytes(method: Callable[[], Any]) -> tuple[int, Any]:
    """(bytes allocated during the call and not given back at its end, what it returned)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = method()
    events = trace.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), result
