"""The state space recurrence of Mamba2 (Dao and Gu 2024) with torch, for many sequences at once.

Every head has a state S [P, N]. A token with input x [P], step size dt, and vectors B and C [N],
which the heads of a group share, makes of it

    S <- exp(dt A) S + dt x B^T,    y = S C + D x        (A < 0)

All in fp32. A token's bits depend on no other sequence: nothing but matrix products of a fixed size
and elementwise functions, and of these only such as torch computes alike at the end of a vector and
in its middle (not silu, sigmoid and softplus, whose results for the last few elements differ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def scan_cells(
    x: torch.Tensor,  # [N, G, H, P]
    dt: torch.Tensor,  # [N, G, H], zero where a cell holds no token
    A: torch.Tensor,  # [H], negative
    B: torch.Tensor,  # [N, G, K, S], K groups of heads
    C: torch.Tensor,  # [N, G, K, S]
    D: torch.Tensor,  # [H]
    states: torch.Tensor,  # [M, H, P, S], left as they are after the last cell
    widths: Sequence[int],
) -> torch.Tensor:  # [N, G, H, P]
    """Cells of G tokens by matrix products: within a cell each token attends to those before it,
    and what came before the cell is in the state.

    widths: the first widths[0] cells continue the first widths[0] states, the next widths[1] cells
    follow these, and so on; never increasing.
    """
    num_cells, size, heads, _ = x.shape
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # [N, K, G, S]
    decays = (dt * A).exp_().transpose(1, 2).contiguous()  # [N, H, G] of each token's step
    within = decay_products(decays.view(-1, size)).view(num_cells, heads, size, size)
    from_entry = decays[..., :1] * within[..., 0]  # [N, H, G]
    added = x * (within[..., -1, :].transpose(1, 2) * dt)[..., None]  # what of x is left at the cell's end
    y = _carry(added, from_entry, B, C, states, widths)
    return y.add_(_attend(x, dt, within, B, C)).addcmul_(x, D[:, None])


def _attend(x: torch.Tensor, dt: torch.Tensor, within: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """What tokens take from those before them in their cell, and from themselves; `within` is overwritten."""
    (num_cells, groups, size, _), (heads, head_dim) = B.shape, x.shape[2:]
    scores = torch.bmm(C.flatten(0, 1), B.flatten(0, 1).mT).view(num_cells, groups, 1, size, size)
    weights = within.view(num_cells, groups, -1, size, size).mul_(scores).view(-1, size, size)
    inputs = x.new_empty(num_cells, heads, size, head_dim)
    torch.mul(x.transpose(1, 2), dt.transpose(1, 2)[..., None], out=inputs)
    return torch.bmm(weights, inputs.view(-1, size, head_dim)).view_as(inputs).transpose(1, 2)


def _carry(
    added: torch.Tensor,  # [N, G, H, P]
    from_entry: torch.Tensor,  # [N, H, G] decay from before the cell to after each token's step
    B: torch.Tensor,  # [N, K, G, S]
    C: torch.Tensor,  # [N, K, G, S]
    states: torch.Tensor,
    widths: Sequence[int],
) -> torch.Tensor:
    """What tokens take from before their cell; and the states move on, cell by cell."""
    num_cells, groups, size, state_size = B.shape
    by_group = (groups, -1, added.shape[-1])  # of heads
    columns = added.view(num_cells, size, groups, -1).permute(0, 2, 3, 1).flatten(0, 1)  # [N * K, H / K * P, G]
    y = torch.empty_like(added)
    first = 0
    for width in widths:
        cells, parts = slice(first, first + width), slice(first * groups, (first + width) * groups)
        state = states[:width].view(width * groups, -1, state_size)  # [width * K, H / K * P, S]
        taken = torch.bmm(C[cells].flatten(0, 1), state.mT).view(width, groups, size, -1).transpose(1, 2)
        decay = from_entry[cells].transpose(1, 2)[..., None]  # [width, G, H, 1]
        torch.mul(
            taken.unflatten(3, by_group[1:]), decay.unflatten(2, by_group[:2]), out=y[cells].unflatten(2, by_group[:2])
        )
        states[:width].mul_(from_entry[cells, :, -1, None, None])
        state.baddbmm_(columns[parts], B[cells].flatten(0, 1))
        first += width
    return y


def decay_products(decays: torch.Tensor) -> torch.Tensor:
    """[M, G] -> [M, G, G]: at (i, j) the product of the decays j + 1 to i, zero above the diagonal.

    By doubling: squares on the diagonal are complete, and two neighbours give the rectangle below
    the first. A product of numbers up to one cannot overflow, nor does it lose small differences
    of large sums, as exp(sum_i - sum_j) would. G: a power of two.
    """
    size = decays.shape[-1]
    out = decays.new_zeros(len(decays), size, size)
    out.diagonal(dim1=1, dim2=2).fill_(1)
    half = 1
    while half < size:
        pairs = size // (2 * half)
        squares = out.view(-1, pairs, 2 * half, pairs, 2 * half).diagonal(dim1=1, dim2=3)  # [M, 2h, 2h, pairs]
        first_of_second = decays.view(-1, pairs, 2 * half)[:, None, :, half]
        rows = squares[:, half:, half] * first_of_second  # [M, h, pairs] from the first square's end
        torch.mul(rows[:, :, None], squares[:, None, half - 1, :half], out=squares[:, half:, :half])
        half *= 2
    return out


def update_states(
    x: torch.Tensor,  # [R, H, P]
    dt: torch.Tensor,  # [R, H]
    A: torch.Tensor,  # [H], negative
    B: torch.Tensor,  # [R, K, S], K groups of heads
    C: torch.Tensor,  # [R, K, S]
    D: torch.Tensor,  # [H]
    pool: torch.Tensor,  # [num_slots, H, P, S], updated in place
    runs: Sequence[tuple[int, int, int]],
) -> torch.Tensor:  # [R, H, P]
    """One token for each of R sequences.

    runs: (slot, first, last): the rows first to last - 1 have the slots from `slot` on. The states
    are by far the largest thing here: in runs of neighbours they are updated where they are.
    """
    grouped = (len(x), B.shape[1], -1, x.shape[-1], 1)  # [R, K, H / K, P, 1]
    decays = (dt * A).exp_().view(*grouped[:3], 1, 1)
    inputs = (x * dt[..., None]).view(grouped)
    B, C = B[:, :, None, None], C[:, :, None, None]
    y = x * D[:, None]
    for slot, first, last in runs:
        rows = slice(first, last)
        state = pool[slot : slot + last - first].view(last - first, *inputs.shape[1:4], -1)
        state.mul_(decays[rows]).addcmul_(inputs[rows], B[rows])
        y[rows] += (state * C[rows]).sum(-1).flatten(1, 2)
    return y


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x) with the same bits for an element wherever it stands."""
    divisor = x.neg().exp_().add_(1)
    return torch.div(x, divisor, out=divisor)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)) with the same bits for an element wherever it stands."""
    return torch.where(x > 20, x, x.exp().log1p_())
