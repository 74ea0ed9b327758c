"""A weight sync that does not arrive cannot pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.weights import WeightsMismatch, bind, checksum, pack, to_arrays, unpack


def network() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def test_round_trip_is_exact():
    arrays = {"b": np.float32([[1, 2]]), "a": np.zeros((0,), np.float32)}
    weights = pack(arrays, 7)
    assert weights.version == 7
    assert weights.data.dtype == np.uint8
    for name, array in unpack(weights.data).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_binding_copies_into_the_network():
    target = network()
    sent = {name: np.full(p.shape, 0.5, np.float32) for name, p in target.named_parameters()}
    assert bind(dict(target.named_parameters()), pack(sent, 1)) == 2
    assert all((p == 0.5).all() for p in target.parameters())


def test_other_names_bind_nothing_and_fail():
    target = dict(network().named_parameters())
    sent = {f"base_model.{name}": array for name, array in to_arrays(target).items()}
    with pytest.raises(WeightsMismatch, match="bind to 0 of 2 trained parameters"):
        bind(target, pack(sent, 1))
    with pytest.raises(WeightsMismatch, match="bind to 0 of 2"):
        bind(target, pack({}, 1))


def test_other_shapes_and_changed_values_fail():
    target = dict(network().named_parameters())
    arrays = to_arrays(target)
    with pytest.raises(WeightsMismatch, match="does not fit"):
        bind(target, pack({**arrays, "bias": np.zeros(5, np.float32)}, 1))
    weights = pack(arrays, 1)
    damaged = weights.data.copy()
    damaged[-1] ^= 0xFF
    with pytest.raises(WeightsMismatch, match="checksum"):
        bind(target, replace(weights, data=damaged))


def test_a_parameter_that_cannot_hold_the_value_fails():
    """fp32 weights into a half-precision module: the sender's checksum is over what was meant."""
    target = dict(network().half().named_parameters())
    sent = {name: np.full(p.shape, 1 / 3, np.float32) for name, p in target.items()}
    with pytest.raises(WeightsMismatch, match="checksum"):
        bind(target, pack(sent, 1))


def test_checksum_is_of_names_shapes_and_values():
    base = {"a": np.float32([1, 2])}
    assert checksum(base) == checksum({"a": np.float32([1, 2])})
    assert checksum(base) != checksum({"b": np.float32([1, 2])})
    assert checksum(base) != checksum({"a": np.float32([[1, 2]])})
    assert checksum(base) != checksum({"a": np.float32([1, 3])})
