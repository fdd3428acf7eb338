"""Hadamard matrices, and randomised rotations built from them.

A Hadamard matrix H of order n has entries +-1 and H H^T = n I. Sylvester's construction gives the orders 2^k, Paley's
two constructions (Paley 1933, On Orthogonal Matrices, J. Math. Phys. 12) q + 1 for a prime power q = 3 mod 4 and
2 (q + 1) for q = 1 mod 4, and Kronecker products combine them: 576 = 36 x 16, 1536 = 12 x 128.

A rotation is x -> x diag(s) (A (x) S) / sqrt(n) with random signs s, a small A and Sylvester's S. The fast
Walsh-Hadamard transform applies it. This is the randomised Hadamard transform of QuaRot (arXiv 2404.00456, section
3.1), transposed: the signs come first and so act on the rotated vector. If no construction gives a Hadamard matrix of
the order, A is a random orthogonal matrix. Shapes: n order, m order of the small factor, V any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGEST_POWER = 3
"""The largest k for which the fields GF(p^k) are built: a polynomial of degree <= 3 without roots is irreducible."""

RADIX = 128
"""The radix of the fast transform; affects speed only."""


def hadamard(order: int) -> Tensor:
    """Build a Hadamard matrix of ``order``, float64 [n, n] of +-1.

    Raises:
        ValueError: none of the constructions gives this order.
    """
    small = small_factor(order)
    if small is None:
        raise ValueError(f"no construction gives a Hadamard matrix of order {order}")
    return torch.kron(_paley(small), _sylvester(order // small))


def small_factor(order: int) -> int | None:
    """Return the smallest m with order = m * 2^k such that m is 1 or an order of Paley's, or None."""
    if order <= 0:
        return None
    small = order // (order & -order)  # the odd part
    while small <= order:
        if small == 1 or _paley_field(small) is not None:
            return small
        small *= 2
    return None


def walsh_hadamard(x: Tensor) -> Tensor:
    """Multiply ``x`` [V, 2^k] by Sylvester's matrix of order 2^k along the last dimension, without normalising.

    The fast transform has radix :data:`RADIX`: matrix products of that size are faster than butterflies of radix 2.
    """
    width = x.shape[-1]
    if width <= RADIX:
        return x @ _sylvester(width).to(x)
    x = x.unflatten(-1, (width // RADIX, RADIX)) @ _sylvester(RADIX).to(x)  # [V, 2^k / RADIX, RADIX]
    return walsh_hadamard(x.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (factor (x) S) of order n = m * 2^k, never built as a whole.

    Attributes:
        factor: [m, m], orthogonal up to the scale 1 / sqrt(2^k).
        order: n.
        signs: +-1 [n], or None for none.
    """

    factor: Tensor
    order: int
    signs: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Compute ``x Q`` along the last dimension, [V, n], in the dtype of ``x``."""
        small = len(self.factor)
        if self.signs is not None:
            x = x * self.signs.to(x)
        x = walsh_hadamard(x.unflatten(-1, (small, self.order // small)))  # [V, m, 2^k]
        factor = self.factor.to(x)
        x = x * factor if small == 1 else factor.T @ x
        return x.flatten(-2)

    def matrix(self) -> Tensor:
        """Build Q explicitly, float64 [n, n]."""
        return self.apply(torch.eye(self.order, dtype=torch.float64, device=self.factor.device))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Rotation:
        """Return the same rotation on another device, and in another dtype if given."""
        signs = None if self.signs is None else self.signs.to(device, dtype)
        return replace(self, factor=self.factor.to(device, dtype), signs=signs)


def make_rotation(order: int, generator: torch.Generator, *, random_signs: bool = True) -> Rotation:
    """Build a rotation of ``order`` in float64: a Hadamard matrix where possible, else orthogonal (x) Sylvester.

    Args:
        order: n, above 0.
        generator: draws the signs, and the orthogonal matrix if one is needed.
        random_signs: False for a Hadamard matrix without signs.
    """
    small = small_factor(order)
    if small is not None:
        factor = _paley(small) / math.sqrt(order)
    else:
        small = order // (order & -order)
        factor = random_orthogonal(small, generator) / math.sqrt(order // small)
    signs = None
    if random_signs:
        signs = 2.0 * torch.randint(0, 2, (order,), generator=generator).double() - 1
    return Rotation(factor, order, signs)


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """Draw a uniformly random orthogonal matrix, float64 [n, n], as the Q of a Gaussian matrix's QR decomposition."""
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # LAPACK chooses the signs of R's diagonal; only with all of them positive is Q uniformly distributed.
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).double()


def _sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix of order 2^k, float64 [n, n]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _paley(order: int) -> Tensor:
    """Paley's Hadamard matrix of ``order`` (or the matrix of order 1), float64 [n, n]."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    field = _paley_field(order)
    assert field is not None
    core = _jacobsthal(*field)  # [q, q], of 0 and +-1
    size = len(core) + 1
    conference = torch.ones(size, size, dtype=torch.float64)
    conference[1:, 1:] = core
    conference[0, 0] = 0
    eye = torch.eye(size, dtype=torch.float64)
    if size == order:  # first construction: the conference matrix is skew-symmetric, and I + C is Hadamard
        conference[1:, 0] = -1
        return eye + conference
    # second construction: each entry becomes a block of 2 x 2
    off_diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(conference, off_diagonal) + torch.kron(eye, diagonal)


def _paley_field(order: int) -> tuple[int, int] | None:
    """(prime, power) of the field from which Paley's first or second construction makes ``order``, or None."""
    if order % 4 != 0:
        return None
    for size, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        field = _prime_power(size)
        if size % 4 == remainder and field is not None:
            return field
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with number = p^k, p prime and k at most :data:`LARGEST_POWER`, or None."""
    if number < 2:
        return None
    prime = next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), number)  # smallest divisor
    power = round(math.log(number, prime))
    if prime**power != number or power > LARGEST_POWER:
        return None
    return prime, power


def _jacobsthal(prime: int, power: int) -> Tensor:
    """chi(a - b) for all a, b of GF(prime^power) [q, q], where chi is 1 on squares, -1 on other elements and 0 on 0."""
    size = prime**power
    places = prime ** torch.arange(power)  # [k]
    digits = torch.arange(size)[:, None] // places % prime  # [q, k], coefficients of each element's polynomial
    character = -torch.ones(size, dtype=torch.float64)
    character[(_squares(digits, prime) * places).sum(-1)] = 1
    character[0] = 0
    differences = (digits[:, None] - digits[None]) % prime  # [q, q, k]
    return character[(differences * places).sum(-1)]


def _squares(digits: Tensor, prime: int) -> Tensor:
    """The square of every element [q, k], modulo an irreducible polynomial."""
    power = digits.shape[1]
    product = digits.new_zeros(len(digits), 2 * power - 1)
    for i in range(power):
        for j in range(power):
            product[:, i + j] += digits[:, i] * digits[:, j]
    lower = _irreducible(prime, power)
    # Reduce from the highest degree down: x^power = -(lower coefficients) modulo the polynomial.
    for degree in range(2 * power - 2, power - 1, -1):
        product[:, degree - power : degree] -= product[:, degree, None] * lower
    return product[:, :power] % prime


def _irreducible(prime: int, power: int) -> Tensor:
    """The lower coefficients [k] of a monic polynomial of degree k <= 3 without a root in GF(prime).

    Up to degree 3 a polynomial without roots is irreducible.
    """
    points = torch.arange(prime)
    for number in range(prime**power):
        lower = number // prime ** torch.arange(power) % prime  # [k]
        values = points**power + (lower * points[:, None] ** torch.arange(power)).sum(-1)
        if power == 1 or bool((values % prime != 0).all()):
            return lower
    raise AssertionError("every degree has an irreducible polynomial")
