"""Hadamard matrices and rotations against their definition, and the fast product against the dense one."""

import pytest
import torch

from pqqp_lightning.algorithms.hadamard import (
    RADIX,
    Rotation,
    hadamard,
    make_rotation,
    random_orthogonal,
    small_factor,
    walsh_hadamard,
)

WITHOUT = [3, 7, 9, 18, 39, 172]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 44, 52, 64, 100, 344, 576, 1536])
def test_a_hadamard_matrix_has_orthogonal_rows_of_plus_and_minus_one(order):
    matrix = hadamard(order)
    assert matrix.dtype == torch.float64
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(
    ("order", "small"), [(1, 1), (128, 1), (576, 36), (1536, 12), (11008, 344), (13824, 108), (14336, 28), (172, None)]
)
def test_the_smallest_factor_at_hand_is_taken(order, small):
    assert small_factor(order) == small


@pytest.mark.parametrize("order", [0, *WITHOUT])
def test_an_order_without_a_construction_is_refused(order):
    with pytest.raises(ValueError, match=f"no construction gives a Hadamard matrix of order {order}"):
        hadamard(order)


@pytest.mark.parametrize("order", [2, 8, RADIX, 4 * RADIX])
def test_the_fast_transform_agrees_with_signs_counted_bit_by_bit(order):
    # Sylvester's entry (i, j) is -1 to the number of binary places where both i and j have a 1
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)])
    x = torch.randn(3, order, dtype=torch.float64)
    assert torch.allclose(walsh_hadamard(x), x @ signs.double(), atol=1e-10)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("order", [1, 4, 12, 40, 576, 1536, *WITHOUT])
def test_a_rotation_is_orthogonal_and_its_fast_product_is_the_dense_one(order, signs):
    rotation = make_rotation(order, seeded(), random_signs=signs)
    dense = rotation.matrix()
    assert torch.allclose(dense @ dense.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    x = torch.randn(2, 5, order, dtype=torch.float64)
    assert torch.allclose(rotation.apply(x), x @ dense, atol=1e-10)
    assert torch.allclose(rotation.apply(x.float()), (x @ dense).float(), atol=1e-4)
    if small_factor(order) is not None:
        assert torch.allclose(dense.abs(), torch.full_like(dense, order**-0.5))


def test_a_rotation_is_the_product_that_it_stands_for():
    rotation = make_rotation(48, seeded())
    expected = torch.diag(rotation.signs) @ torch.kron(hadamard(12), hadamard(4)) / 48**0.5
    assert torch.allclose(rotation.matrix(), expected, atol=1e-12)


def test_chance_comes_from_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (make_rotation(18, seeded(s)).matrix() for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_orthogonal_matrices_are_uniform_in_sign():
    diagonals = torch.stack([random_orthogonal(3, seeded(s)).diagonal() for s in range(300)])
    assert (diagonals.mean(0).abs() < 0.12).all()  # a bare QR has a negative diagonal far more often


def test_one_large_entry_is_spread_evenly():
    x = torch.zeros(576, dtype=torch.float64)
    x[7] = 100.0
    rotated = make_rotation(576, seeded()).apply(x)
    assert torch.allclose(rotated.abs(), torch.full_like(x, 100 / 24))


def test_a_rotation_moves_to_another_dtype():
    rotation = make_rotation(12, seeded()).to(torch.device("cpu"), torch.float32)
    assert isinstance(rotation, Rotation)
    assert rotation.factor.dtype == rotation.signs.dtype == torch.float32
