"""What the bounds of the three adapters share: what they stand on, and the factors of (*)."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from lora_limits.certificate.columns import Columns
from lora_limits.certificate.floors import Floors, QueryRounding
from lora_limits.certificate.rounding import column_lengths, frobenius
from lora_limits.certificate.row_bounds import Column, KeyMoments, Rows, Setup, settle
from lora_limits.coordinates.frame import Frame
from lora_limits.linalg import dot
from lora_limits.problem import LoRAProblem


class Grounds(NamedTuple):
    """What a bound stands on before the first query is seen."""

    problem: LoRAProblem
    frame: Frame
    columns: Columns
    floors: Floors
    setup: Setup
    moments: KeyMoments
    reach: Float[Array, ""]  # the longest centred input row of a key or a value


class Visit(NamedTuple):
    """What one block of queries hands to the bound; tokens last, except in x_in."""

    x_in: Float[Array, "n dq"]  # inputs
    x: Float[Array, "d n"]  # the same in the frame's coordinates
    u: Float[Array, "rq n"]  # X_Q B
    q: Float[Array, "d n"] | None  # centred queries; for key adapters
    dq: Float[Array, "d n"] | None  # computed gradient rows; for query adapters
    c: Float[Array, "dv n"]  # residual
    m: Float[Array, "dv n"]  # m(v), centred
    m_xb: Float[Array, "rv n"] | None  # mean of X_V B under f~; for value adapters
    scale_y: Float[Array, "1 n"]  # |Y_i| + |v_mean|
    rounded: QueryRounding
    live: Float[Array, "1 n"]  # 1 on tokens not seen before, else 0


class Shares(NamedTuple):
    """What a block of queries may add to the error of an adapter's two arrays."""

    sums: Any  # over the queries, by entry: the named sums of the adapter's module
    truncation: Float[Array, "2 n"]  # of each query, its largest entry in dA and in dB
    rounding: Float[Array, "2 n"]  # the same of rounding


class Terms(NamedTuple):
    """Row quantities shared by the adapters: each bounds one factor of (*)."""

    cn: Float[Array, "1 n"]  # |N3^-T c~|, its rounding included
    z: Float[Array, "1 n"]  # >= sqrt(eta[|Z^o|^2])
    z_prime: Float[Array, "1 n"]  # the same under eta'
    dc: Float[Array, "1 n"]  # >= |N3^-T eps[v^o]|
    root1: Float[Array, "1 n"]  # sqrt(eta[1])
    fz: Float[Array, "1 n"]  # >= sqrt(E_f[|Z|^2])
    summed: Float[Array, "1 n"]  # rounding of a row's sums over sqrt(absolute sum of k^2)
    residual: Float[Array, "1 n"]  # the same of what rounded c~, m(v), values and D do to it
    moved: Float[Array, "1 n"]  # the same for rounded scores, over sqrt(E_f[k^2])
    flat: Float[Array, "1 n"]  # >= sum_j |w_j P'(s_ij) q^o_j| / D_i: the same for rounding of k

    def second(self, k: Column) -> Float[Array, "1 n"]:
        """The two terms of (*) in eps: eps[q^o] E_f[k] and eps[v^o] . Cov_f(v, k)."""
        return self.cn * self.z * self.root1 * k.centre + self.dc * self.fz * k.mean

    def rounded(
        self, k: Column, floor: Float[Array, ""] | float, grown: Float[Array, ""] | float = 1.0
    ) -> Float[Array, "1 n"]:
        """Rounding of a row of G~ in the column k, whose own entries are rounded by `floor`.

        grown: what the rounding of sums grows by before it is an entry of the column.
        """
        sums = (grown * self.summed + self.residual) * k.size
        return sums + self.moved * k.mean + self.flat * floor


def make(grounds: Grounds, visit: Visit, rows: Rows, at: dict[str, Column]) -> Terms:
    """The factors of (*) for a block of queries, by Cauchy-Schwarz in each measure."""
    gamma = grounds.setup.gamma
    columns = grounds.columns
    floors = grounds.floors
    one, of_z, of_w = at["one"], at["Z"], at["W"]
    inverse = frobenius(columns.n3_inverse)
    # rounding of m(v): of the sums over keys, of D
    m = column_lengths(visit.m)
    rounded_m = gamma * one.size * (inverse * of_z.size + one.size * m) + floors.lost
    # of c~: of m(v), of the last additions, of the values and their mean
    rounded_c = rounded_m + gamma * (m + visit.scale_y)
    values = floors.value * one.size**2
    moved_c = inverse * (rounded_c + values + floors.v_mean)
    cn = column_lengths(dot(columns.n3_inverse, visit.c)) + moved_c
    mz = column_lengths(dot(columns.n3, visit.m)) + frobenius(columns.n3) * (rounded_m + values)
    mw = column_lengths(dot(columns.n3_inverse, visit.m)) + inverse * (rounded_m + values)
    # sqrt(eta[|Z^o|^2]) <= sqrt(eta[|Z|^2]) + |m(Z)| sqrt(eta[1]), and so for W
    z = of_z.eta + mz * one.eta
    z_prime = of_z.eta_prime + mz * one.eta_prime
    dc = one.eta * (of_w.eta + mw * one.eta)
    # q^o = c~ . v^o, in absolute values
    spread = of_z.size + mz * one.size
    # sums of c~_m v_jm and of rho: they feel |c~||v_j|, however little is left of c~ . v^o
    c = column_lengths(visit.c)
    summed = 2 * gamma * c * inverse * spread
    # of c~, of D in the whole row, of m(v) in rho, of each value and of their mean in rho
    residual = (moved_c + gamma * one.size**2 * cn) * spread
    residual = residual + c * (rounded_m + floors.value + values) * one.size
    # e^{2 d} - 1 <= 2.03 d for d <= 1/100: three factors f in G, and one in c
    moved = visit.rounded.score * (7 * cn + 3 * of_w.mean) * of_z.mean
    flat = cn * spread * one.size
    return Terms(*settle(cn, z, z_prime, dc, one.eta, of_z.mean, summed, residual, moved, flat))
