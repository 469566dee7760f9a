"""
Part 10: hyperbolic space, twice. The Poincare ball can be drawn, the hyperboloid of Lorentz has the
simpler formulas, and both are the same space. Its flat rival, Euclid's, is here, too.

    python part_10/hyperbolic.py    how exact are float32 and float64 far from the origin?

Starts here. Nothing is taken from another part.

Why curved? In a tree with b children per node, the number of nodes at depth r is b^r. In a plane
the circumference of a circle of radius r is 2 pi r: soon there is no room for the leaves. In the
hyperbolic plane it is 2 pi sinh(r), which grows like e^r, as the tree does.

The curvature is -1 everywhere. A space with curvature -c is the same space with all lengths divided
by sqrt(c), so a free scale of the distances would do the same.

All functions accept any leading dimensions, in float32 or float64, and broadcast over them. In a
float32 ball numbers stay finite up to the norm 1 - BOUNDARY, which is also where project() stops.

    Nickel and Kiela 2017, Poincare embeddings for learning hierarchical representations
    Nickel and Kiela 2018, Learning continuous hierarchies in the Lorentz model
    Ganea, Becigneul and Hofmann 2018, Hyperbolic neural networks
    Ungar 2008, A gyrovector space approach to hyperbolic geometry
    Mishne, Wan, Wang and Yang 2023, The numerical stability of hyperbolic representation learning

Shapes: D dimensions of the space. A point of the ball is (..., D), one of the hyperboloid
(..., D + 1), and so are the tangent vectors at it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
from dataclasses import dataclass

import torch

from shared import parse_args

# A point of the ball may come no closer to the boundary than this (Nickel and Kiela 2017, eq. 5).
# The norm 1 - 1e-5 lies at the distance 12.2 from the origin. There the spacing of float32 numbers
# (6e-8) is still small against 1 - |x|, so the distance keeps two digits after the point.
BOUNDARY = 1e-5

# The same limit as a distance from the origin: 2 artanh(1 - BOUNDARY) = log((2 - b) / b) = 12.2.
LONGEST = math.log((2 - BOUNDARY) / BOUNDARY)

# Lengths are not divided by less than this. Its square is still a normal number in float32.
TINY = 1e-15


def dot(x, y):
    """The inner product of Euclid, (..., D) and (..., D) -> (..., 1)."""
    return (x * y).sum(dim=-1, keepdim=True)


def length(x):
    """The norm of Euclid, (..., D) -> (..., 1). Its gradient at 0 is 0, not nan."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def arsinh(t):
    """log(t + sqrt(1 + t^2)) for t >= 0, written so that a small t keeps all its digits. On a CPU
    torch.asinh takes several times as long as this, and would be half of the training time."""
    return torch.log1p(t + t * t / (1 + (1 + t * t).sqrt()))


class Poincare:
    """The unit ball. Its lines are arcs that meet the boundary at right angles, and its boundary is
    infinitely far away: towards it, equal steps look shorter and shorter."""

    @staticmethod
    def room(x):
        """1 - |x|^2 (..., 1): how far it is to the boundary. This is where digits are lost."""
        return 1 - dot(x, x)

    @staticmethod
    def conformal_factor(x):
        """lambda_x = 2 / (1 - |x|^2) (..., 1): a small step at x is this much longer than it
        looks. Angles are what they look like."""
        return 2 / Poincare.room(x)

    @staticmethod
    def distance(x, y):
        """d(x, y) (...).

        The paper writes arcosh(1 + 2 |x - y|^2 / ((1 - |x|^2) (1 - |y|^2))) (2017, eq. 1). Of two
        points close together this sees nothing, because 1 + 1e-9 is 1 in float32. As
        arcosh(1 + 2 t^2) = 2 arsinh(t), the form below is the same, and it is exact there.
        """
        t = length(x - y) / (Poincare.room(x) * Poincare.room(y)).sqrt()
        return 2 * arsinh(t).squeeze(-1)

    @staticmethod
    def add(x, y):
        """Moebius addition (..., D): go from the origin to x, then as far as y is from the origin,
        in the direction of y. It is not commutative. -x is the inverse: add(-x, add(x, y)) = y.

        The textbook's form (Ungar 2008; Ganea et al. 2018, eq. 4) is

            ((1 + 2<x, y> + |y|^2) x + (1 - |x|^2) y) / (1 + 2<x, y> + |x|^2 |y|^2)

        Near the boundary its denominator is a tiny difference of numbers close to 1: in float32 it
        becomes 0 or negative. With 2<x, y> = |x + y|^2 - |x|^2 - |y|^2 all terms are positive.
        """
        total = x + y
        total_squared = dot(total, total)
        numerator = Poincare.room(x) * total + total_squared * x
        denominator = Poincare.room(x) * Poincare.room(y) + total_squared
        return Poincare.project(numerator / denominator)

    @staticmethod
    def gyrate(x, y, v):
        """gyr[x, y] v (..., D): the rotation that makes Moebius addition associative again,
        add(x, add(y, v)) = add(add(x, y), gyrate(x, y, v)) (Ungar 2008, eq. 1.27 and 3.126)."""
        xy, xv, yv = dot(x, y), dot(x, v), dot(y, v)
        xx, yy = dot(x, x), dot(y, y)
        along_x = 2 * xy * yv + yv - xv * yy
        along_y = -yv * xx - xv
        total = x + y
        denominator = Poincare.room(x) * Poincare.room(y) + dot(total, total)
        return v + 2 * (along_x * x + along_y * y) / denominator

    @staticmethod
    def exp(x, v):
        """Where a straight walk arrives that starts at x with the velocity v and lasts for one unit
        of time (..., D) (Ganea et al. 2018, eq. 12). Its length is lambda_x |v|."""
        norm = length(v).clamp(min=TINY)
        walked = Poincare.conformal_factor(x) * norm
        return Poincare.add(x, torch.tanh(walked / 2) * v / norm)

    @staticmethod
    def log(x, y):
        """The velocity at x with which exp(x, velocity) arrives at y (..., D) (Ganea et al. 2018,
        eq. 13). Its norm contains 2 artanh(|-x + y|), which is the distance; artanh(1) is
        infinite, the distance is not."""
        difference = Poincare.add(-x, y)
        direction = difference / length(difference).clamp(min=TINY)
        walked = Poincare.distance(x, y).unsqueeze(-1)
        return walked / Poincare.conformal_factor(x) * direction

    @staticmethod
    def transport(x, y, v):
        """The tangent vector v at x, carried along the line to y without turning it (..., D)
        (parallel transport; Ganea et al. 2018, eq. 18). It keeps its hyperbolic length, so near the
        boundary it looks shorter."""
        return Poincare.room(y) / Poincare.room(x) * Poincare.gyrate(y, -x, v)

    @staticmethod
    def project(x):
        """Points outside of the norm 1 - BOUNDARY come back to it (..., D)."""
        norm = length(x)
        limit = 1 - BOUNDARY
        return torch.where(norm > limit, x * (limit / norm.clamp(min=TINY)), x)

    @staticmethod
    def riemannian_gradient(x, gradient):
        """The gradient of autograd, divided by lambda_x^2 (..., D) (2017, eq. 4). In hyperbolic
        units the slope is smaller by lambda_x, and a step must look smaller by another lambda_x."""
        return gradient * Poincare.room(x) ** 2 / 4

    @staticmethod
    def descend(x, gradient, lr):
        """One step of Riemannian SGD (..., D): a straight step of Euclid, and back into the ball if
        it left it (2017, eq. 5). This stands for exp(x, -lr * riemannian gradient), which it
        equals up to the order of lr^2."""
        return Poincare.project(x - lr * Poincare.riemannian_gradient(x, gradient))

    @staticmethod
    def start(n, d, generator):
        """n points close to the origin (n, D) in float64: in each coordinate uniform within 1e-3,
        as in the paper."""
        uniform = torch.rand(n, d, generator=generator, dtype=torch.float64)
        return (2 * uniform - 1) * 1e-3


class Lorentz:
    """One sheet of a hyperboloid in D + 1 dimensions, {x: <x, x> = -1, x_0 > 0}, where <x, y> is
    the inner product of special relativity. x_0 is cosh of the distance from the origin (1, 0, ...)
    and grows without a bound: nothing crowds at a boundary."""

    @staticmethod
    def inner(x, y):
        """<x, y> = -x_0 y_0 + x_1 y_1 + ... (..., 1) (2018, eq. 2)."""
        product = x * y
        return product[..., 1:].sum(dim=-1, keepdim=True) - product[..., :1]

    @staticmethod
    def distance(x, y):
        """d(x, y) (...). The paper writes arcosh(-<x, y>) (2018, eq. 5). As
        <x - y, x - y> = -2 - 2<x, y>, the form below is the same, and it is exact for close points.
        """
        return 2 * arsinh(Lorentz.chord_squared(x, y).sqrt() / 2).squeeze(-1)

    @staticmethod
    def chord_squared(x, y):
        """<x - y, x - y> = 4 sinh(d/2)^2 (..., 1). It cannot be negative, but its rounding errors
        can. The root of the smallest value has a finite gradient."""
        difference = x - y
        return Lorentz.inner(difference, difference).clamp(min=TINY**2)

    @staticmethod
    def norm(x, v):
        """The hyperbolic length of a tangent vector v at x, sqrt(<v, v>) (..., 1).

        Far from the origin <v, v> is a small difference of large numbers. It is never less than
        |v_1, v_2, ...|^2 / x_0^2, which is the case of a vector that points away from the origin,
        so less than this is a rounding error.
        """
        norm = Lorentz.inner(v, v).clamp(min=TINY**2).sqrt()
        return torch.maximum(norm, length(v[..., 1:]) / x[..., :1])

    @staticmethod
    def exp(x, v):
        """Where a straight walk arrives that starts at x with the velocity v, after one unit of
        time: cosh(|v|) x + sinh(|v|) v / |v| (..., D + 1) (2018, eq. 9). A walk is cut at twice the
        longest distance from the origin: cosh(89) is infinite in float32."""
        norm = Lorentz.norm(x, v)
        walked = norm.clamp(max=2 * LONGEST)
        return Lorentz.project(torch.cosh(walked) * x + torch.sinh(walked) * v / norm)

    @staticmethod
    def log(x, y):
        """The velocity at x with which exp(x, velocity) arrives at y (..., D + 1):
        d / sinh(d) * (y + <x, y> x), where y + <x, y> x is what of y is tangent at x."""
        tangent = (y - x) - Lorentz.chord_squared(x, y) / 2 * x
        walked = Lorentz.distance(x, y).unsqueeze(-1)
        return walked / torch.sinh(walked).clamp(min=TINY) * tangent

    @staticmethod
    def transport(x, y, v):
        """The tangent vector v at x, carried along the line to y without turning it (..., D + 1):
        v + <y, v> / (1 - <x, y>) * (x + y)."""
        two_minus = 2 + Lorentz.chord_squared(x, y) / 2
        return v + Lorentz.inner(y, v) / two_minus * (x + y)

    @staticmethod
    def project(x):
        """The point of the hyperboloid with the same x_1, x_2, ... (..., D + 1): x_0 is computed
        again. Points further from the origin than the ball's project() allows come back."""
        space = x[..., 1:]
        norm = length(space)
        limit = math.sinh(LONGEST)
        space = torch.where(norm > limit, space * (limit / norm.clamp(min=TINY)), space)
        return torch.cat([(1 + dot(space, space)).sqrt(), space], dim=-1)

    @staticmethod
    def riemannian_gradient(x, gradient):
        """The gradient of autograd -> the direction of steepest ascent on the hyperboloid
        (..., D + 1) (2018, algorithm 1): the sign of its first component is changed, as the inner
        product says, and then it is made tangent at x by adding <x, h> x."""
        h = torch.cat([-gradient[..., :1], gradient[..., 1:]], dim=-1)
        return h + Lorentz.inner(x, h) * x

    @staticmethod
    def descend(x, gradient, lr):
        """One step of Riemannian SGD along a straight line (..., D + 1) (2018, algorithm 1)."""
        return Lorentz.exp(x, -lr * Lorentz.riemannian_gradient(x, gradient))

    @staticmethod
    def start(n, d, generator):
        """The points where Poincare.start puts them (n, D + 1)."""
        return to_lorentz(Poincare.start(n, d, generator))


def to_lorentz(x):
    """A point of the ball -> the same point of the hyperboloid, (..., D) -> (..., D + 1)."""
    scale = Poincare.conformal_factor(x)
    return torch.cat([scale - 1, scale * x], dim=-1)  # (1 + |x|^2) / (1 - |x|^2) is scale - 1


def to_poincare(x):
    """A point of the hyperboloid -> the same point of the ball, (..., D + 1) -> (..., D)
    (2018, eq. 11). Light that shines from (-1, 0, ...) through the point hits the ball here."""
    return x[..., 1:] / (1 + x[..., :1])


class Euclid:
    """Flat space, the rival."""

    @staticmethod
    def distance(x, y):
        """|x - y| (...)."""
        return length(x - y).squeeze(-1)

    @staticmethod
    def descend(x, gradient, lr):
        """One step of SGD (..., D)."""
        return x - lr * gradient

    @staticmethod
    def start(n, d, generator):
        """Where Poincare.start puts them, too (n, D)."""
        return Poincare.start(n, d, generator)


class EuclidSquared(Euclid):
    """Flat space with the squared distance, which is what Nickel and Kiela compared with."""

    @staticmethod
    def distance(x, y):
        """|x - y|^2 (...)."""
        return dot(x - y, x - y).squeeze(-1)


# where the numbers break --------------------------------------------------------------------------


def textbook_distance(x, y):
    """The ball's distance as the paper writes it, to show what the other form is good for (...)."""
    ratio = dot(x - y, x - y) / (Poincare.room(x) * Poincare.room(y))
    return torch.acosh(1 + 2 * ratio).squeeze(-1)


def error_at(radius, gap, dtype):
    """The largest relative error of the distance between two points, of which one lies at the
    distance `radius` from the origin and the other is up to `gap` further out -> {form: error}.

    Each pair lies on one line through the origin, in 64 directions of a plane, so the truth is
    known without any formula. The points are rounded to the dtype before anything is computed, as
    they would be in a table of embeddings.
    """
    angle = torch.arange(64, dtype=torch.float64) / 64 * 2 * math.pi
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (64, 2)
    truth = gap * torch.linspace(0.5, 1, 64, dtype=torch.float64)
    near = torch.full_like(truth, radius)[:, None]
    far = near + truth[:, None]

    ball_x = (direction * torch.tanh(near / 2)).to(dtype)
    ball_y = (direction * torch.tanh(far / 2)).to(dtype)
    sheet_x = torch.cat([near.cosh(), direction * near.sinh()], dim=-1).to(dtype)
    sheet_y = torch.cat([far.cosh(), direction * far.sinh()], dim=-1).to(dtype)

    measured = {
        "ball": Poincare.distance(ball_x, ball_y),
        "ball, textbook": textbook_distance(ball_x, ball_y),
        "Lorentz": Lorentz.distance(sheet_x, sheet_y),
    }
    errors = {}
    for name, distance in measured.items():
        error = (distance.double() - truth).abs() / truth
        errors[name] = error.nan_to_num(math.inf).max().item()
    return errors


@dataclass
class Config:
    gap: float = 0.01  # the largest true distance between the two points of a pair

    def __post_init__(self):
        assert self.gap > 0, f"gap={self.gap} must be above 0"


if __name__ == "__main__":
    cfg = parse_args(Config)
    print(f"largest relative error of the distance between two points, up to {cfg.gap} apart")
    print("radius  1 - |x|    float32: ball  textbook  Lorentz    float64: ball  textbook  Lorentz")
    for radius in (1, 2, 4, 6, 8, 10, 12):
        single = error_at(radius, cfg.gap, torch.float32)
        double = error_at(radius, cfg.gap, torch.float64)
        cells = [f"{error:8.0e}" for error in single.values()]
        more_cells = [f"{error:8.0e}" for error in double.values()]
        margin = 1 - math.tanh(radius / 2)
        print(f"{radius:6}  {margin:7.1e}  ", *cells, "         ", *more_cells, sep="  ")
    print(f"project() stops at 1 - |x| = {BOUNDARY}, which is at the radius {LONGEST:.1f}")
