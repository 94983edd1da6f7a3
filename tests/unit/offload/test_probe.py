"""The timing of kernels that `cloister plan` rests on."""

from __future__ import annotations

import dataclasses

import pytest

from cloister.offload import least_seconds, measure_kernels
from cloister.ring import FORMATS


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_kernel_costs_something(name: str):
    costs = dataclasses.asdict(measure_kernels(FORMATS[name], seconds=0.001))
    assert list(costs) == ["otp", "encode", "combine", "lattice", "mask", "unmask"]
    assert all(0 < each < 1000 for each in costs.values())


def test_the_first_call_does_not_count_and_the_least_of_three_does():
    clock = iter([0.0, 10.0, 10.0, 11.0, 20.0, 22.0])
    calls: list[int] = []
    assert least_seconds(lambda: calls.append(1), seconds=0.0, clock=lambda: next(clock)) == 1.0
    assert len(calls) == 4
