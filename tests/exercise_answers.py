"""Answers that the checks must accept, written differently from the lab's own, and wrong ones that each must recognise.

RIGHT[name] lists functions; WRONG[name] maps a piece of the message that must come to a function that errs.
"""

import functools
import math
import re

import numpy as np
import torch
import triton
import triton.language as tl

INF = math.inf


def grouped(pairs):
    return {name: list(functions) for name, functions in pairs.items()}


# -- 01 ---------------------------------------------------------------------------------------------------------------


def softmax_by_torch(x):
    return torch.softmax(x, dim=-1)


def softmax_by_lse(x):
    return torch.exp(x - torch.logsumexp(x, -1, keepdim=True))


def softmax_row_by_row(x):
    rows = x.reshape(-1, x.shape[-1])
    return torch.stack([(r - r.max()).exp() / (r - r.max()).exp().sum() for r in rows]).reshape(x.shape)


def unsafe_softmax(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def softmax_with_one_maximum(x):
    p = (x - x.max()).exp()
    return p / p.sum(-1, keepdim=True)


def softmax_in_place(x):
    x -= x.amax(-1, keepdim=True)
    x.exp_()
    return x.div_(x.sum(-1, keepdim=True))


def softmax_recursive(x):
    if x.ndim > 1:
        return torch.stack([softmax_recursive(row) for row in x])
    return (x - x.max()).exp() / (x - x.max()).exp().sum()


def softmax_without_the_mean(x):
    p = (x - x.mean(-1, keepdim=True)).exp()
    return p / p.sum(-1, keepdim=True)


def update_in_place(m, l, x):
    """Changes its arguments, and returns a list."""
    new = torch.maximum(m, x.amax(-1))
    safe = torch.where(new == -INF, 0.0, new)
    l.mul_((m - safe).exp()).add_((x - safe[:, None]).exp().sum(-1))
    return [m.copy_(new), l]


def update_in_one_tensor(m, l, x):
    return torch.stack(update(m.double(), l.double(), x.double()))


def update_by_numpy(m, l, x):
    m, l, x = (t.cpu().numpy().astype(np.float64) for t in (m, l, x))
    new = np.maximum(m, x.max(1))
    safe = np.where(np.isinf(new), 0.0, new)
    return new, np.exp(m - safe) * l + np.exp(x - safe[:, None]).sum(1)


def update(m, l, x, *, alpha=None, shift=None, keep=True, new_max=None, safe=True):
    """online_update with parts to break."""
    m_new = torch.maximum(m, x.amax(-1)) if new_max is None else new_max(m, x)
    base = m_new if shift is None else shift(m, m_new, x)
    if safe:
        p = torch.where(x == -INF, torch.zeros_like(x), torch.exp(x - base[:, None]))
        a = torch.where(m == -INF, torch.zeros_like(m), torch.exp(m - m_new)) if alpha is None else alpha(m, m_new)
    else:
        p, a = torch.exp(x - base[:, None]), torch.exp(m - m_new)
    return m_new, (a * l if keep else 0) + p.sum(-1)


def update_number_by_number(m, l, x):
    m, l = m.clone(), l.clone()
    for i in range(x.shape[0]):
        for value in x[i].tolist():
            if value == -INF:
                continue
            new = max(m[i].item(), value)
            l[i] = l[i] * math.exp(m[i].item() - new) + math.exp(value - new)
            m[i] = new
    return m, l


def update_by_lse(m, l, x):
    """In logarithms: log l + m is the log-sum-exp so far."""
    m_new = torch.maximum(m, x.amax(-1))
    lse = torch.logaddexp(m + l.log(), x.logsumexp(-1))
    return m_new, torch.where(m_new == -INF, torch.zeros_like(l), (lse - m_new).exp())


def normalised(m, l, o, x, v, bug=""):
    m_new = torch.maximum(m, x.amax(-1))
    a, p = (m - m_new).exp(), (x - m_new[:, None]).exp()
    l_new = a * l + p.sum(-1)
    old = {"no l": a[:, None] * o, "no alpha": l[:, None] * o}.get(bug, (a * l)[:, None] * o)
    total = old + p @ v
    return m_new, l_new, {"undivided": total}.get(bug, total / l_new[:, None])


def normalised_by_weights(m, l, o, x, v):
    """The new average as a mixture of the old one and of this block's."""
    m_new, l_new = update(m, l, x)
    share = (l_new - (x - m_new[:, None]).exp().sum(-1)) / l_new
    return m_new, l_new, share[:, None] * o + (1 - share)[:, None] * (torch.softmax(x, -1) @ v)


def normalised_averages(m, l, o, x, v):
    m_new, l_new = update(m, l, x)
    return m_new, l_new, o + torch.softmax(x, -1) @ v


def normalised_as_one_more_column(m, l, o, x, v):
    """What is behind is one column more, with the score m + log l and the value o."""
    both = torch.cat([(m + l.log())[:, None], x], 1).double()
    weights, new = both.softmax(1), torch.maximum(m, x.amax(1))
    return new, (both - new[:, None]).exp().sum(1), weights[:, :1] * o + weights[:, 1:] @ v.double()


def combine_by_softmax(outs, lses):
    weights = lses.double().softmax(0).nan_to_num(0.0)
    return torch.einsum("sn,snd->nd", weights, outs.double()), lses.double().logsumexp(0)


def combine_the_winner(outs, lses):
    return outs[lses.argmax(0), torch.arange(outs.shape[1], device=outs.device)], lses.logsumexp(0)


def combine_two_by_two(outs, lses):
    out, lse = outs[0], lses[0]
    for o, s in zip(outs[1:], lses[1:]):
        both = torch.logaddexp(lse, s)
        w1 = torch.where(lse == -INF, torch.zeros_like(lse), (lse - both).exp())
        w2 = torch.where(s == -INF, torch.zeros_like(s), (s - both).exp())
        out, lse = w1[:, None] * out + w2[:, None] * o, both
    return out, lse


def combine_by_maximum(outs, lses):
    top = lses.amax(0)
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    w = (lses - top).exp()
    total = w.sum(0)
    out = (w[:, :, None] * outs).sum(0) / total.clamp(min=1e-30)[:, None]
    return out, top + total.log()


def combine_with(weights):
    def broken(outs, lses):
        return (weights(lses)[..., None] * outs).sum(0), torch.logsumexp(lses, 0)

    return broken


def combine_blindly(outs, lses):
    lse = torch.logsumexp(lses, 0)
    return ((lses - lse).exp()[..., None] * outs).sum(0), lse


def combine_and_overflow(outs, lses):
    w = lses.exp()
    return (w[..., None] * outs).sum(0) / w.sum(0)[:, None], w.sum(0).log()


def tiles(q, k, v, block_m, block_n, causal, *, bug=""):
    """The v2 order, written with (N, 1) columns, and with a switch for each classic mistake."""
    n_q, n_k = q.shape[0], k.shape[0]
    work = torch.float16 if bug == "half" and q.dtype == torch.float16 else torch.float32
    scale = {"no scale": 1.0, "scale twice": 1 / q.shape[1]}.get(bug, q.shape[1] ** -0.5)
    shift = 0 if bug == "top left" else n_k - n_q
    stop = n_k // block_n * block_n if bug == "tail dropped" else n_k
    hidden = -1e9 if bug == "large negative" else -INF
    outs, lses = [], []
    for i in range(0, n_q, block_m):
        q_i = q[i : i + block_m].to(work)
        row = torch.arange(i, i + q_i.shape[0], device=q.device)[:, None] + shift
        m = torch.full((q_i.shape[0], 1), -INF, dtype=work, device=q.device)
        l, a = torch.zeros_like(m), torch.zeros(q_i.shape[0], v.shape[1], dtype=work, device=q.device)
        for j in range(0, stop, block_n):
            k_j, v_j = k[j : j + block_n].to(work), v[j : j + block_n].to(work)
            s = (q_i @ k_j.T) * scale
            if causal and bug != "no mask":
                column = torch.arange(j, j + k_j.shape[0], device=q.device)[None, :]
                if bug == "within the tile":
                    column, row = column - j, row - shift - i
                s = torch.where(column >= row if bug == "no diagonal" else column > row, hidden, s)
                if bug == "within the tile":
                    row = row + shift + i
            m_new = torch.maximum(m, s.max(dim=1, keepdim=True).values)
            base = m_new if bug == "nan" else torch.where(m_new == -INF, 0.0, m_new)
            p, alpha = torch.exp(s - base), torch.exp(m - base)
            l = (1.0 if bug in ("no l", "neither") else alpha) * l + p.sum(1, keepdim=True)
            a = (1.0 if bug in ("no o", "neither") else alpha) * a + p @ v_j
            if bug == "each step":
                a = a / l
            m = m_new
        if bug in ("each step", "undivided"):
            l = torch.ones_like(l) if bug == "each step" else l
            outs.append((a if bug == "undivided" else a / l).to(q.dtype))
            lses.append((m + torch.log(l))[:, 0])
            continue
        if bug == "rows dropped" and i + block_m > n_q:
            a = a * 0
        outs.append((a / (l if bug == "nan" else torch.where(l == 0, 1.0, l))).to(q.dtype))
        lses.append((m + torch.log(l))[:, 0])
    out, lse = torch.cat(outs), torch.cat(lses)
    if bug == "lse is l":
        lse = torch.exp(lse - _tops(q, k, causal))
    return out, lse / math.log(2) if bug == "base 2" else lse


def _tops(q, k, causal):
    s = q.float() @ k.float().T * q.shape[1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones_like(s).tril(k.shape[0] - q.shape[0]) == 0, -INF)
    return s.amax(-1)


def tiles_by_merging(q, k, v, block_m, block_n, causal):
    """Each block of keys by itself, and then the merge by log-sum-exps."""
    out = torch.zeros(q.shape[0], v.shape[1], device=q.device)
    lse = torch.full((q.shape[0],), -INF, device=q.device)
    shift = k.shape[0] - q.shape[0]
    for i in range(0, q.shape[0], block_m):
        for j in range(0, k.shape[0], block_n):
            s = q[i : i + block_m].float() @ k[j : j + block_n].float().T / math.sqrt(q.shape[1])
            if causal:
                visible = torch.ones_like(s).tril(shift + i - j).bool()
                s = s.masked_fill(~visible, -INF)
            part = s.logsumexp(-1)
            o = s.softmax(-1).nan_to_num(0.0) @ v[j : j + block_n].float()
            old = lse[i : i + block_m].clone()
            both = torch.logaddexp(old, part)
            w = torch.where(old == -INF, 0.0, (old - both).exp())
            u = torch.where(part == -INF, 0.0, (part - both).exp())
            out[i : i + block_m] = w[:, None] * out[i : i + block_m] + u[:, None] * o
            lse[i : i + block_m] = both
    return out.to(q.dtype), lse


def tiles_in_float64(q, k, v, block_m, block_n, causal):
    out, lse = tiles(q.double(), k.double(), v.double(), block_m, block_n, causal)
    return out.to(q.dtype), lse


def whole_matrix(q, k, v, block_m, block_n, causal):
    s = q.float() @ k.float().T * q.shape[1] ** -0.5
    if causal:
        s = s.masked_fill(~torch.ones_like(s).tril(k.shape[0] - q.shape[0]).bool(), -INF)
    return (s.softmax(-1).nan_to_num(0.0) @ v.float()).to(q.dtype), s.logsumexp(-1)


# -- 02 ---------------------------------------------------------------------------------------------------------------


@triton.jit
def lse_kernel(x_ptr, y_ptr, row_stride, n_columns, BLOCK: tl.constexpr, BUG: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if BUG == "contiguous":
        row_stride = n_columns
    place = x_ptr + row * row_stride + offs
    if BUG == "no mask":
        x = tl.load(place)
    elif BUG == "other 0":
        x = tl.load(place, mask=offs < n_columns, other=0.0)
    else:
        x = tl.load(place, mask=offs < n_columns, other=float("-inf"))
    m = tl.max(x, axis=0)
    if BUG == "overflow":
        m = m * 0.0
    total = tl.sum(tl.exp(x - m), axis=0)
    if BUG == "base 2":
        y = m + tl.log2(total)
    elif BUG == "no m":
        y = tl.log(total)
    elif BUG == "maximum":
        y = m
    else:
        y = m + tl.log(total)
    tl.store(y_ptr + row, y)


def lse_by_kernel(x, bug=""):
    y = torch.empty(x.shape[0], device=x.device)
    lse_kernel[(x.shape[0],)](x, y, x.stride(0), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]), BUG=bug)
    return y


def lse_without_the_mean(x):
    mean = x.mean(-1)
    return mean + (x - mean[:, None]).exp().sum(-1).log()


@triton.jit
def lse_in_base_two_kernel(x_ptr, y_ptr, row_stride, n_columns, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * row_stride + offs, mask=offs < n_columns, other=0.0)
    x = tl.where(offs < n_columns, x, float("-inf")) * 1.4426950408889634
    m = tl.max(x, axis=0)
    tl.store(y_ptr + tl.program_id(0), (m + tl.log2(tl.sum(tl.exp2(x - m), axis=0))) * 0.6931471805599453)


def lse_in_base_two(x):
    y = torch.zeros(x.shape[0], device=x.device)
    lse_in_base_two_kernel[(x.shape[0],)](x, y, x.stride(0), x.shape[1], BLOCK=2 * triton.next_power_of_2(x.shape[1]))
    return y


def kind_by_looking(start_m, block_m, start_n, block_n, n_q, n_k, *, shift=None, bug=""):
    shift = n_k - n_q if shift is None else shift
    rows = range(start_m, min(start_m + block_m, n_q))
    columns = range(start_n, start_n + block_n)
    seen = [[j <= i + shift and j < n_k for j in columns] for i in rows]
    if not any(map(any, seen)):
        return "skipped"
    return "plain" if all(map(all, seen)) else "masked"


def kind_by_numpy(start_m, block_m, start_n, block_n, n_q, n_k):
    i = np.arange(start_m, min(start_m + block_m, n_q))[:, None]
    j = np.arange(start_n, start_n + block_n)[None, :]
    seen = (j <= i + n_k - n_q) & (j < n_k)
    return {(False, False): "skipped", (True, False): "masked", (True, True): "plain"}[
        bool(seen.any()), bool(seen.all())
    ]


def kind_top_left(start_m, block_m, start_n, block_n, n_q, n_k):
    return kind_by_looking(start_m, block_m, start_n, block_n, n_q, n_k, shift=0)


def kind_always_masked(*place):
    kind = kind_by_looking(*place)
    return "masked" if kind == "plain" else kind


def kind_never_skipped(*place):
    kind = kind_by_looking(*place)
    return "masked" if kind == "skipped" else kind


def kind_without_tail(start_m, block_m, start_n, block_n, n_q, n_k):
    kind = kind_by_looking(start_m, block_m, start_n, block_n, n_q, n_k)
    inside = kind_by_looking(start_m, block_m, start_n, min(block_n, n_k - start_n), n_q, n_k)
    return inside if kind == "masked" else kind


def kind_by_last_row(start_m, block_m, start_n, block_n, n_q, n_k):
    last = min(start_m + block_m, n_q) - 1 + n_k - n_q
    if start_n > last:
        return "skipped"
    return "plain" if start_n + block_n - 1 <= last and start_n + block_n <= n_k else "masked"


def kind_skipping_the_corner(start_m, block_m, start_n, block_n, n_q, n_k):
    if start_n >= min(start_m + block_m, n_q) - 1 + n_k - n_q:
        return "skipped"
    return kind_by_looking(start_m, block_m, start_n, block_n, n_q, n_k)


def kind_masking_the_corner(start_m, block_m, start_n, block_n, n_q, n_k):
    kind = kind_by_looking(start_m, block_m, start_n, block_n, n_q, n_k)
    return "masked" if kind == "plain" and start_n + block_n - 1 >= start_m + n_k - n_q else kind


def kind_by_first_row(start_m, block_m, start_n, block_n, n_q, n_k):
    first = start_m + n_k - n_q
    if start_n > first:
        return "skipped"
    return "plain" if start_n + block_n - 1 <= first and start_n + block_n <= n_k else "masked"


@triton.jit
def banded_kernel(q_ptr, k_ptr, v_ptr, o_ptr, scale, window, N, H, D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BUG: tl.constexpr):  # fmt: skip
    bh, start_m = tl.program_id(1), tl.program_id(0) * BLOCK_M
    base = (bh // H) * N * H * D + (bh % H) * D
    d, i = tl.arange(0, D), start_m + tl.arange(0, BLOCK_M)
    q = tl.load(q_ptr + base + i[:, None] * (H * D) + d[None, :], mask=i[:, None] < N, other=0.0).to(tl.float32)
    o = tl.zeros([BLOCK_M, D], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if BUG == "twice":
        scale = scale * scale
    if BUG == "no scale":
        scale = scale / scale
    for start_n in range(0, N, BLOCK_N):  # over all blocks: slow, and right
        j = start_n + tl.arange(0, BLOCK_N)
        kv = base + j[:, None] * (H * D) + d[None, :]
        k = tl.load(k_ptr + kv, mask=j[:, None] < N, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + kv, mask=j[:, None] < N, other=0.0).to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (j[None, :] < N) & (j[None, :] >= i[:, None] - window) & (j[None, :] <= i[:, None])
        if BUG == "no window":
            seen = (j[None, :] < N) & (j[None, :] <= i[:, None])
        if BUG == "narrow":
            seen = (j[None, :] < N) & (j[None, :] > i[:, None] - window) & (j[None, :] <= i[:, None])
        if BUG == "wide":
            seen = (j[None, :] < N) & (j[None, :] >= i[:, None] - window - 1) & (j[None, :] <= i[:, None])
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        safe = tl.maximum(m_new, -1e30)
        if BUG == "nan":
            safe = m_new
        p = tl.exp(s - safe[:, None])
        alpha = tl.exp(m - safe)
        if BUG == "exp2":
            p, alpha = tl.exp2(s - safe[:, None]), tl.exp2(m - safe)
        if BUG == "no l":
            l = l + tl.sum(p, axis=1)
        else:
            l = l * alpha + tl.sum(p, axis=1)
        if BUG != "no o":
            o = o * alpha[:, None]
        o += tl.dot(p, v, input_precision="ieee")
        m = m_new
    tl.store(
        o_ptr + base + i[:, None] * (H * D) + d[None, :],
        o / tl.where(l > 0, l, 1.0)[:, None] if BUG != "nan" else o / l[:, None],
        mask=i[:, None] < N,
    )


def banded(q, k, v, window, bug="", block=16):
    B, N, H, D = q.shape
    o = torch.empty_like(q)
    grid = (triton.cdiv(N, block), B * H)
    banded_kernel[grid](q, k, v, o, D**-0.5, window, N, H, D=D, BLOCK_M=block, BLOCK_N=block, BUG=bug)
    return o


def d_scores(S, V, dO, dL, bug=""):
    P, dP = torch.softmax(S, 1), dO @ V.T
    delta = (dO * (P @ V)).sum(1, keepdim=True)
    dL = dL[:, None]
    return {
        "no delta": P * (dP + dL),
        "no dL": P * (dP - delta),
        "minus dL": P * (dP - delta - dL),
        "no P": dP - delta + dL,
        "delta of dP": P * (dP - dP.sum(1, keepdim=True) + dL),
    }.get(bug, P * (dP - delta + dL))


def d_scores_by_autograd(S, V, dO, dL):
    with torch.enable_grad():
        S = S.detach().requires_grad_()
        value = ((S.softmax(-1) @ V) * dO).sum() + (S.logsumexp(-1) * dL).sum()
        return torch.autograd.grad(value, S)[0]


def d_scores_backward(S, V, dO, dL):
    """As a student writes it who has never met torch.no_grad: on the argument itself."""
    S.requires_grad_()
    ((S.softmax(-1) @ V * dO).sum() + (S.logsumexp(-1) * dL).sum()).backward()
    return S.grad


def bug_by_simulation(q, k, v, out, block, *, blind=()):
    """The kernels in NumPy, a row at a time; `blind` leaves names out."""
    q, k, v, out = (t.cpu().numpy().astype(np.float64) for t in (q, k, v, out))
    n, d = q.shape
    right = n // block * block

    def run(scale=d**-0.5, causal=True, last=n, fix_l=True, fix_o=True):
        rows = []
        for i in range(n):
            m, l, o = -np.inf, 0.0, np.zeros(d)
            for start in range(0, n, block):
                j = np.arange(start, min(start + block, last))
                j = j[j <= i] if causal else j
                if len(j) == 0:
                    continue
                s = scale * (k[j] @ q[i])
                new = max(m, s.max())
                p, a = np.exp(s - new), np.exp(m - new)
                l, o, m = (a if fix_l else 1) * l + p.sum(), (a if fix_o else 1) * o + p @ v[j], new
            rows.append(o / l)
        return np.stack(rows)

    made = {
        "right": run(), "scale": run(scale=1.0), "mask": run(causal=False), "tail": run(last=right),
        "l": run(fix_l=False), "o": run(fix_o=False),
    }  # fmt: skip
    return min((name for name in made if name not in blind), key=lambda name: np.abs(made[name] - out).max())


def bug_mistaken(taken, given):
    """Takes one bug for another."""

    def find(*arguments):
        found = bug_by_simulation(*arguments)
        return given if found == taken else found

    return find


def bug_by_its_marks(q, k, v, out, block):
    """Which rows are wrong, and whether by one factor each."""
    n, d = q.shape
    s = (q @ k.T * d**-0.5).masked_fill(~torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), -INF)
    exact = s.softmax(-1) @ v
    off = (out - exact).abs().amax(1) > 1e-4
    if not off.any():
        return "right"
    if off[0]:
        return "mask"
    if not off[: n // block * block].any():
        return "tail"
    if off[:block].any():
        return "scale"
    spread = (out / exact).std(1) / (out / exact).mean(1).abs()
    return "l" if spread[off].median() < 1e-2 else "o"


def model_attention(query, key, value, scaling, padding, *, bug=""):
    """By SDPA with a mask made by hand."""
    n_q, n_k = query.shape[2], key.shape[2]
    place = torch.arange(n_q, device=query.device)[:, None] + (0 if bug == "top left" else n_k - n_q)
    mask = torch.arange(n_k, device=query.device)[None, :] <= place
    if bug == "no mask":
        mask = torch.ones_like(mask)
    mask = mask[None, None]
    if padding is not None and bug != "padding seen":
        mask = mask & (~padding if bug == "exchanged" else padding)[:, None, None, :]
    scale = None if bug == "scale" else scaling
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out if bug == "layout" else out.transpose(1, 2)


def model_attention_by_softmax(query, key, value, scaling, padding):
    n_q, n_k = query.shape[2], key.shape[2]
    s = scaling * torch.einsum("bhid,bhjd->bhij", query, key)
    hidden = torch.ones(n_q, n_k, dtype=torch.bool, device=s.device).triu(n_k - n_q + 1)
    s = s.masked_fill(hidden, -1e30)
    if padding is not None:
        s = s.masked_fill(~padding[:, None, None, :], -1e30)
    return torch.einsum("bhij,bhjd->bihd", s.softmax(-1), value)


def model_attention_across_heads(query, key, value, scaling, padding):
    n = query.shape[1]
    s = scaling * torch.einsum("bihd,bjhd->bhij", query, key)
    s = s.masked_fill(torch.ones(n, n, dtype=torch.bool, device=s.device).triu(1), -INF)
    return torch.einsum("bhij,bjhd->bhid", s.softmax(-1), value)


# -- 03 ---------------------------------------------------------------------------------------------------------------


def first_length_by_search(layers, heads, vocab):
    n = 1
    while 6 * layers * heads * n * n <= 12 * n * vocab:
        n += 1
    return n


def documents(cu_seqlens, n, *, causal=True, right=True):
    document = torch.zeros(n, dtype=torch.long)
    for border in cu_seqlens[1:-1].tolist():
        document[border if right else border + 1 :] += 1
    mask = document[:, None].eq(document)
    return mask & torch.ones(n, n, dtype=torch.bool).tril() if causal else mask


def documents_block_by_block(cu_seqlens, n):
    mask = torch.zeros(n, n, dtype=torch.bool)
    borders = cu_seqlens.tolist()
    for start, stop in zip(borders, borders[1:]):
        mask[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril() > 0
    return mask


def turned(x, positions, base, *, exponent=2, sign=1, neighbours=False, swap=False):
    d = x.shape[-1]
    theta = base ** (-exponent * torch.arange(d // 2).double() / d)
    angle = (positions.double().cpu()[:, None] * theta)[:, None].to(x.device)
    cos, sin = angle.cos().float(), sign * angle.sin().float()
    if swap:
        cos, sin = sin, cos
    if neighbours:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def turned_as_complex(x, positions, base):
    d = x.shape[-1]
    angle = positions[:, None].float() / base ** (torch.arange(0, d, 2, device=x.device).float() / d)
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((z.real, z.imag), -1)


def oom(message, bug=""):
    sizes = {}
    for name, pattern in {
        "asked": r"allocate ([\d.]+) ([GM])iB",
        "free": r"([\d.]+) ([GM])iB is free",
        "idle": r"([\d.]+) ([GM])iB is reserved",
    }.items():
        value, unit = re.search(pattern, message).groups()
        sizes[name] = float(value) * (1 if unit == "G" or bug == "units" else 2**-10)
    asked, free, idle = sizes["asked"], sizes["free"], sizes["idle"]
    missing = {"reserve": asked - free - idle, "asked": asked, "sign": free - asked}.get(bug, asked - free)
    fits = {"always": False, "never": True}.get(bug, asked <= free + idle)
    return missing, "fragments" if fits else "too much"


def oom_by_words(message):
    words = message.split()

    def before(word, back):
        i = words.index(word) - back
        return float(words[i]) / {"GiB": 1, "MiB": 1024}[words[i + 1].rstrip(".")]

    asked, free, idle = before("GPU", 2), before("free.", 3), before("reserved", 3)
    return asked - free, "too much" if asked - free > idle else "fragments"


def loss_in_chunks(hidden, weight, targets, chunk, bug=""):
    n, loss, pieces, dw = len(hidden), 0.0, [], torch.zeros_like(weight)
    losses = []
    stop = n // chunk * chunk if bug == "tail" and n >= chunk else n
    for i in range(0, stop, chunk):
        h, t = hidden[i : i + chunk], targets[i : i + chunk]
        z = h @ weight.T
        p = z.exp() / z.exp().sum(1, keepdim=True) if bug == "overflow" else z.softmax(1)
        own = z[torch.arange(len(h)), t]
        part = (z.exp().sum(1).log() if bug == "overflow" else z.logsumexp(1)) - own
        loss = loss + part.sum()
        losses.append(part.mean())
        hot = torch.nn.functional.one_hot(t, weight.shape[0])
        g = p if bug == "no onehot" else p - hot
        g = g / {"sum": 1, "by chunk": len(h)}.get(bug, n)
        pieces.append(g @ weight)
        dw = g.T @ h if bug == "overwritten" else dw + g.T @ h
    if bug == "tail":
        pieces.append(torch.zeros(n - stop, hidden.shape[1], device=hidden.device))
    mean = torch.stack(losses).mean() if bug == "mean of means" else loss / n
    return mean, torch.cat(pieces), dw


def loss_at_once(hidden, weight, targets, chunk):
    with torch.enable_grad():
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(h @ w.T, targets)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))


def loss_by_autograd_of_chunks(hidden, weight, targets, chunk):
    dh, dw, total = [], torch.zeros_like(weight), 0.0
    for h, t in zip(hidden.split(chunk), targets.split(chunk)):
        with torch.enable_grad():
            h, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
            part = torch.nn.functional.cross_entropy(h @ w.T, t, reduction="sum") / len(hidden)
            one, two = torch.autograd.grad(part, (h, w))
        dh.append(one)
        dw += two
        total += part.item()
    return total, torch.cat(dh), dw


def loss_backward(hidden, weight, targets, chunk):
    weight.requires_grad_()
    total, pieces = 0.0, []
    for h, t in zip(hidden.split(chunk), targets.split(chunk)):
        h = h.clone().requires_grad_()
        part = torch.nn.functional.cross_entropy(h @ weight.T, t, reduction="sum") / len(hidden)
        part.backward()
        pieces.append(h.grad)
        total = total + part
    return total, torch.cat(pieces), weight.grad


# -- 04 ---------------------------------------------------------------------------------------------------------------


def v2_by_loop(seqlen, head_dim, block_m, itemsize):
    total = 0
    for start in range(0, seqlen, block_m):
        rows = min(block_m, seqlen - start)
        total += 2 * rows * head_dim * itemsize + 4 * rows  # Q in, O and the log-sum-exp out
        total += 2 * seqlen * head_dim * itemsize
    return total


def roofline_by_ridge(flops, moved, tflops, gb_per_s):
    if flops / moved >= 1e3 * tflops / gb_per_s:
        return flops / tflops * 1e-9, "arithmetic"
    return moved / gb_per_s * 1e-6, "memory"


def share_by_pandas(rows, factor):
    import pandas as pd

    table = pd.DataFrame(rows)
    inside = table["op"].str.contains("attention")
    attention, rest = table.loc[inside, "self_ms"].sum(), table.loc[~inside, "self_ms"].sum()
    return attention / (attention + rest), (attention + rest) / (rest + attention / factor)


def share(rows, factor, column="self_ms", speed=None):
    total = sum(r[column] for r in rows)
    part = sum(r[column] for r in rows if "attention" in r["op"]) / total
    return part, 1 / (1 - part + part / factor) if speed is None else speed(part, factor)


def share_that_eats_its_rows(rows, factor):
    for row in rows:
        row["inside"] = "attention" in row.pop("op")
        row.pop("total_ms")
    total = sum(row["self_ms"] for row in rows)
    part = sum(row.pop("self_ms") for row in rows if row["inside"]) / total
    rows.clear()
    return np.float64(part), torch.tensor(1 / (1 - part + part / factor), dtype=torch.float64)


def blocks(seqlen, heads, head_dim, itemsize, shared_bytes, stages, processors, *, q=1, kv=2, fill=True, bug=""):
    best = None
    for m in (16, 32, 64, 128):
        for n in (128, 64, 32, 16):
            if head_dim * itemsize * (q * m + kv * (1 if bug == "stages" else stages) * n) > shared_bytes:
                continue
            programs = heads * -(-seqlen // m)
            starved = fill and programs < processors
            rank = (starved, -(-seqlen // m) if not starved else -(-seqlen // m), -n, m)
            if bug == "narrow":
                rank = (starved, -(-seqlen // m), n, m)
            if best is None or rank < best[0]:
                best = (rank, (m, n))
    return best[1]


def blocks_by_steps(seqlen, heads, head_dim, itemsize, shared_bytes, stages, processors):
    sizes = [128, 64, 32, 16]
    pairs = [(m, n) for m in sizes for n in sizes if (m + 2 * stages * n) * head_dim * itemsize <= shared_bytes]
    full = [p for p in pairs if heads * math.ceil(seqlen / p[0]) >= processors]
    pairs = full or pairs
    passes = min(math.ceil(seqlen / m) for m, _ in pairs)
    pairs = [p for p in pairs if math.ceil(seqlen / p[0]) == passes]
    widest = max(n for _, n in pairs)
    return min(p for p in pairs if p[1] == widest)


def blocks_smallest(*arguments):
    return 16, 16


broken = functools.partial

RIGHT = grouped(
    {
        "score_bytes": [lambda b, h, n, s: b * h * n**2 * s, lambda *a: math.prod(a) * a[2]],
        "safe_softmax": [
            softmax_by_torch,
            softmax_by_lse,
            softmax_row_by_row,
            softmax_in_place,
            softmax_recursive,
            torch.nn.Softmax(-1),
            lambda x: x.double().softmax(-1).cpu().numpy(),
        ],
        "online_update": [
            update,
            update_number_by_number,
            update_by_lse,
            update_in_place,
            update_in_one_tensor,
            update_by_numpy,
        ],
        "normalised_update": [normalised, normalised_by_weights, normalised_as_one_more_column],
        "combine": [combine_two_by_two, combine_by_maximum, combine_by_softmax],
        "tiled_attention": [tiles, tiles_by_merging, tiles_in_float64],
        "program_count": [lambda b, h, n, m: b * h * -(-n // m), lambda b, h, n, m: math.ceil(n / m) * h * b],
        "row_lse": [lse_by_kernel, lse_in_base_two],
        "tile_kind": [kind_by_looking, kind_by_numpy],
        "window_attention": [banded, broken(banded, block=64)],
        "score_gradient": [d_scores, d_scores_by_autograd, d_scores_backward],
        "find_bug": [bug_by_simulation, bug_by_its_marks],
        "gpt2_attention": [model_attention, model_attention_by_softmax],
        "kv_head": [lambda h, n, g: h * g // n, lambda h, n, g: int(np.repeat(np.arange(g), n // g)[h])],
        "logits_length": [
            lambda gib, V: math.floor(gib * 1024**3 / (12 * V)),
            lambda gib, V: max(n for n in range(10**5) if 12 * n * V <= gib << 30),
        ],
        "overtaking_length": [first_length_by_search, lambda L, H, V: math.floor(2 * V / (L * H)) + 1],
        "document_mask": [
            lambda c, n: documents(c.cpu(), n),
            lambda c, n: documents_block_by_block(c.cpu(), n),
        ],
        "rope": [turned, turned_as_complex],
        "read_oom": [oom, oom_by_words],
        "chunked_loss": [loss_in_chunks, loss_by_autograd_of_chunks, loss_backward],
        "attention_intensity": [lambda n, d, b: n / b, lambda n, d, b: (2 * 2 * n * n * d) / (4 * n * d * b)],
        "v2_bytes": [v2_by_loop, lambda n, d, m, b: 2 * n * d * b * (1 + -(-n // m)) + 4 * n],
        "roofline_time": [
            roofline_by_ridge,
            lambda f, m, t, g: max((f / t / 1e9, "arithmetic"), (m / g / 1e6, "memory")),
        ],
        "attention_share": [share, share_by_pandas, share_that_eats_its_rows],
        "choose_blocks": [blocks, blocks_by_steps, lambda *a: torch.tensor(blocks(*a))],
    }
)

WRONG = {
    "score_bytes": {
        "N rows of N": lambda b, h, n, s: b * h * n * s,
        "heads are missing": lambda b, h, n, s: b * n * n * s,
        "`itemsize` times as much": lambda b, h, n, s: b * h * n * n,
        "in bits": lambda b, h, n, s: 8 * b * h * n * n * s,
        "S and P together": lambda b, h, n, s: 2 * b * h * n * n * s,
    },
    "safe_softmax": {
        "overflowed to inf": unsafe_softmax,
        "One maximum for the whole tensor": softmax_with_one_maximum,
        "columns sum to 1": lambda x: torch.softmax(x, 0),
        "dimension 1": lambda x: torch.softmax(x, 1),
        "logarithm of the softmax": lambda x: torch.log_softmax(x, -1),
        "Powers of 2": lambda x: torch.softmax(x * math.log(2), -1),
        "mean was subtracted": softmax_without_the_mean,
        "dtype is float16": lambda x: x.half().softmax(-1),
        "kept in 16 bits": lambda x: x.half().softmax(-1).float(),
        "All of it is 0": torch.zeros_like,
        "not yet divided": lambda x: (x - x.amax(-1, keepdim=True)).exp(),
        "sum of the whole tensor": lambda x: (
            (x - x.amax(-1, keepdim=True)).exp() / (x - x.amax(-1, keepdim=True)).exp().sum()
        ),
    },
    "online_update": {
        "old l was not rescaled": broken(update, alpha=lambda m, new: torch.ones_like(m)),
        "inverse factor": broken(update, alpha=lambda m, new: torch.where(m == -INF, 0.0, (new - m).exp())),
        "under the old maximum": broken(update, shift=lambda m, new, x: m, safe=True),
        "sum of only this block": broken(update, keep=False),
        "maximum of only this block": broken(update, new_max=lambda m, x: x.amax(-1)),
        "-inf - (-inf) is NaN": broken(update, safe=False),
        "One maximum for all rows": broken(
            update, new_max=lambda m, x: torch.maximum(m, x.amax(-1)).max().expand_as(m)
        ),
        "That is l_new": lambda m, l, x: update(m, l, x)[::-1],
        "multiply only the old l": lambda m, l, x: (
            update(m, l, x)[0],
            (m - update(m, l, x)[0]).exp() * (l + (x - update(m, l, x)[0][:, None]).exp().sum(-1)),
        ),
        "m_new + log(l_new)": lambda m, l, x: (update(m, l, x)[0], update(m, l, x)[0] + update(m, l, x)[1].log()),
    },
    "normalised_update": {
        "not multiplied by the old l": broken(normalised, bug="no l"),
        "not rescaled by e^(m - m_new)": broken(normalised, bug="no alpha"),
        "not yet divided": broken(normalised, bug="undivided"),
        "added this block's average": normalised_averages,
        "Divided by this block's sum": lambda m, l, o, x, v: (
            *update(m, l, x),
            normalised(m, l, o, x, v, "undivided")[2] / (x - update(m, l, x)[0][:, None]).exp().sum(-1)[:, None],
        ),
    },
    "combine": {
        "plain mean": combine_with(lambda lses: torch.full_like(lses, 1 / len(lses))),
        "weighted by lse": combine_with(lambda lses: lses / lses.sum(0)),
        "taken over the rows": combine_with(lambda lses: lses.softmax(1)),
        "e^lse overflowed": combine_and_overflow,
        "sees nothing has lse = -inf": combine_blindly,
        "only the piece with the largest lse": combine_the_winner,
        "number of pieces as well": lambda outs, lses: (combine_by_maximum(outs, lses)[0] / 3, lses.logsumexp(0)),
        "sum of the lses": lambda outs, lses: (combine_by_maximum(outs, lses)[0], lses.sum(0)),
    },
    "tiled_attention": {
        "O was not rescaled": broken(tiles, bug="no o"),
        "l was not rescaled": broken(tiles, bug="no l"),
        "Neither l nor O": broken(tiles, bug="neither"),
        "1 / √D is missing": broken(tiles, bug="no scale"),
        "1 / √D twice": broken(tiles, bug="scale twice"),
        "multiplied by √D": lambda q, *rest: tiles(q * q.shape[1], *rest),
        "Powers of 2": lambda q, *rest: tiles(q * math.log(2), *rest),
        "P was multiplied by K": lambda q, k, v, *rest: tiles(q, k, k, *rest),
        "divided by l in each step": broken(tiles, bug="each step"),
        "not yet divided by l": broken(tiles, bug="undivided"),
        "The last rows": broken(tiles, bug="rows dropped"),
        "positions within the tile": broken(tiles, bug="within the tile"),
        "large negative number": broken(tiles, bug="large negative"),
        "lse must be in float32": lambda q, *rest: (tiles(q, *rest)[0], tiles(q, *rest)[1].to(q.dtype)),
        "aligned to the top left": broken(tiles, bug="top left"),
        "causal mask is missing": broken(tiles, bug="no mask"),
        "diagonal itself is masked": broken(tiles, bug="no diagonal"),
        "last columns were left out": broken(tiles, bug="tail dropped"),
        "rows that see no key": broken(tiles, bug="nan"),
        "Sum m, l and O in float32": broken(tiles, bug="half"),
        "That is l:": broken(tiles, bug="lse is l"),
        "in base 2": broken(tiles, bug="base 2"),
        "as large as the matrix of scores": whole_matrix,
    },
    "program_count": {
        "have no program": lambda b, h, n, m: b * h * (n // m),
        "version 1": lambda b, h, n, m: b * h,
        "heads are missing": lambda b, h, n, m: b * -(-n // m),
        "for each row": lambda b, h, n, m: b * h * n,
        "Round up for each head": lambda b, h, n, m: -(-b * h * n // m),
        "no rest makes a further block": lambda b, h, n, m: b * h * (n // m + 1),
    },
    "row_lse": {
        "maximum is missing": broken(lse_by_kernel, bug="no m"),
        "read as 0": broken(lse_by_kernel, bug="other 0"),
        "Neighbours were read": broken(lse_by_kernel, bug="no mask"),
        "n_columns apart": broken(lse_by_kernel, bug="contiguous"),
        "overflowed": broken(lse_by_kernel, bug="overflow"),
        "base 2": broken(lse_by_kernel, bug="base 2"),
        "mean was subtracted": lse_without_the_mean,
        "That is the maximum": broken(lse_by_kernel, bug="maximum"),
    },
    "tile_kind": {
        "from the top left": kind_top_left,
        "costs time and changes nothing": kind_always_masked,
        "must not visit it": kind_never_skipped,
        "the tail needs a mask": kind_without_tail,
        "even the first row must see": kind_by_last_row,
        "asked about an earlier row": kind_by_first_row,
        "one of 'skipped'": lambda *a: True,
        "skip the tile only if start_n is larger": kind_skipping_the_corner,
        "plain includes the diagonal": kind_masking_the_corner,
    },
    "window_attention": {
        "o was not rescaled": broken(banded, bug="no o"),
        "l was not rescaled": broken(banded, bug="no l"),
        "window is not applied": broken(banded, bug="no window"),
        "one column too narrow": broken(banded, bug="narrow"),
        "one column too wide": broken(banded, bug="wide"),
        "scale 1 / √D is missing": broken(banded, bug="no scale"),
        "by the scale twice": broken(banded, bug="twice"),
        "-inf - (-inf) is NaN": broken(banded, bug="nan"),
        "log2(e) is missing": broken(banded, bug="exp2"),
    },
    "score_gradient": {
        "Δ is missing": broken(d_scores, bug="no delta"),
        "dL is missing": broken(d_scores, bug="no dL"),
        "dL has the wrong sign": broken(d_scores, bug="minus dL"),
        "factor P is missing": broken(d_scores, bug="no P"),
        "not the sum of dP": broken(d_scores, bug="delta of dP"),
        "The sign is wrong": lambda *a: -d_scores(*a),
        "S was scaled": lambda S, V, *rest: d_scores(S, V, *rest) * V.shape[1] ** -0.5,
    },
    "find_bug": {
        "rows are wrong, by up to": lambda *a: "right",
        "This output is right": broken(bug_by_simulation, blind=("right",)),
        "times a factor, one for the whole row": bug_mistaken("l", "o"),
        "off by different factors": bug_mistaken("o", "l"),
        "must be v[0]": bug_mistaken("mask", "scale"),
        "the softmax itself is different": bug_mistaken("scale", "mask"),
        "whose own block of keys is not full": bug_mistaken("tail", "mask"),
        "one of 'right'": lambda *a: 3,
    },
    "gpt2_attention": {
        "was not passed on": broken(model_attention, bug="scale"),
        "causal mask is missing": broken(model_attention, bug="no mask"),
        "to the top left": broken(model_attention, bug="top left"),
        "Padding is seen": broken(model_attention, bug="padding seen"),
        "are exchanged": broken(model_attention, bug="exchanged"),
        "must have the shape": broken(model_attention, bug="layout"),
        "across heads": model_attention_across_heads,
    },
    "kv_head": {
        "deals the heads out": lambda h, n, g: h % g,
        "query's own head": lambda h, n, g: h,
        "size of a group": lambda h, n, g: h // g,
        "An index is an integer": lambda h, n, g: h * g / n,
        "it returned nan": lambda h, n, g: math.nan,
    },
    "logits_length": {
        "One more": lambda gib, V: -(-gib * 2**30 // (12 * V)),
        "counted once": lambda gib, V: gib * 2**30 // (4 * V),
        "has 4 bytes": lambda gib, V: gib * 2**30 // (3 * V),
        "not 10⁹": lambda gib, V: gib * 10**9 // (12 * V),
        "not an integer": lambda gib, V: gib * 2**30 / (12 * V),
    },
    "overtaking_length": {
        "layers are missing": lambda L, H, V: 2 * V // H + 1,
        "only in float32": lambda L, H, V: 3 * V // (L * H) + 1,
        "counted once": lambda L, H, V: 2 * V // (3 * L * H) + 1,
        "still as large": lambda L, H, V: 2 * V // (L * H),
        "plus 1 before": lambda L, H, V: 2 * V / (L * H) + 1,
        "must be a whole number": lambda L, H, V: V / (L * H) + 0.5,
    },
    "document_mask": {
        "only the causal mask": lambda c, n: torch.ones(n, n, dtype=torch.bool).tril(),
        "see later tokens of theirs": lambda c, n: documents(c.cpu(), n, causal=False),
        "off by one": lambda c, n: documents(c.cpu(), n, right=False),
        "exchanged: True": lambda c, n: ~documents(c.cpu(), n),
        "must be boolean": lambda c, n: documents(c.cpu(), n).float(),
    },
    "rope": {
        "Neighbours were paired": broken(turned, neighbours=True),
        "runs backwards": broken(turned, sign=-1),
        "is -i/D, not": broken(turned, exponent=1),
        "taken as its position": lambda x, p, b: turned(x, torch.arange(len(x)), b),
        "count from 0": lambda x, p, b: turned(x, p + 1, b),
        "in degrees": lambda x, p, b: turned(x, p * math.pi / 180, b),
        "exponent is -2i, not": broken(turned, exponent=16),
        "halves stand in the wrong order": lambda x, p, b: turned(x, p, b).roll(x.shape[-1] // 2, -1),
        "Sine and cosine are exchanged": lambda x, p, b: turned(x, p, b, swap=True),
    },
    "read_oom": {
        "units were ignored": broken(oom, bug="units"),
        "reserve was subtracted": broken(oom, bug="reserve"),
        "what was asked for": broken(oom, bug="asked"),
        "sign is wrong": broken(oom, bug="sign"),
        "the reserve lies in pieces": broken(oom, bug="always"),
        "Even the whole reserve": broken(oom, bug="never"),
        "That is rounded": lambda message: (round(oom(message)[0], 1), oom(message)[1]),
    },
    "chunked_loss": {
        "mean of the chunks' means": broken(loss_in_chunks, bug="mean of means"),
        "its tokens add nothing": broken(loss_in_chunks, bug="tail"),
        "Subtract 1 at the target": broken(loss_in_chunks, bug="no onehot"),
        "gradient of the sum": broken(loss_in_chunks, bug="sum"),
        "length of the chunk": broken(loss_in_chunks, bug="by chunk"),
        "gradient of only the last chunk": broken(loss_in_chunks, bug="overwritten"),
        "e^logit overflowed": broken(loss_in_chunks, bug="overflow"),
        "must never exist at once": loss_at_once,
    },
    "attention_intensity": {
        "half of the FLOPs": lambda n, d, b: n / b / 2,
        "FLOPs per number": lambda n, d, b: n,
        "O is missing": lambda n, d, b: 4 * n / (3 * b),
        "S and P were counted": lambda n, d, b: 4 * n * n * d / (4 * n * d * b + 4 * n * n * b),
        "bytes per FLOP": lambda n, d, b: b / n,
        "Rounded down": lambda n, d, b: n // b,
    },
    "v2_bytes": {
        "short, but loads all": lambda n, d, m, b: 2 * n * d * b * (1 + n // m) + 4 * n,
        "counted once": lambda n, d, m, b: 4 * n * d * b + 4 * n,
        "version 1's way": lambda n, d, m, b: n * d * b * (3 + -(-n // m)) + 4 * n,
        "log-sum-exp is missing": lambda n, d, m, b: 2 * n * d * b * (1 + -(-n // m)),
        "V is missing": lambda n, d, m, b: n * d * b * (2 + -(-n // m)) + 4 * n,
        "m and l were counted": lambda *a: v2_by_loop(*a) + 4 * a[0],
        "counted in 16 bits": lambda *a: v2_by_loop(*a) - 2 * a[0],
        "Rows that do not exist": lambda n, d, m, b: 2 * -(-n // m) * m * d * b * (1 + -(-n // m)) + 4 * n,
    },
    "roofline_time": {
        "shorter of the two": lambda f, m, t, g: (min(f / t / 1e9, m / g / 1e6), "memory"),
        "sum of the two": lambda f, m, t, g: (f / t / 1e9 + m / g / 1e6, "memory"),
        "in seconds": lambda f, m, t, g: (max(f / t / 1e12, m / g / 1e9), "memory"),
        "the bound is not": lambda f, m, t, g: (max(f / t / 1e9, m / g / 1e6), "memory"),
    },
    "attention_share": {
        "Total times count": broken(share, column="total_ms"),
        "one operation of several": lambda rows, f: (
            next(r["self_ms"] for r in rows if "attention" in r["op"]) / sum(r["self_ms"] for r in rows),
            1.0,
        ),
        "costs nothing": broken(share, speed=lambda s, f: 1 / (1 - s)),
        "does not become faster": broken(share, speed=lambda s, f: f),
        "That is rounded": lambda rows, f: (round(share(rows, f)[0], 4), 1.0),
        "old time is left": broken(share, speed=lambda s, f: 1 - s + s / f),
    },
    "choose_blocks": {
        "V is missing": broken(blocks, kv=1),
        "stages are missing": broken(blocks, bug="stages"),
        "larger block_n fits": broken(blocks, bug="narrow"),
        "multiprocessors idle": broken(blocks, fill=False),
        "a larger block_m": blocks_smallest,
        "block_m comes first": lambda *a: blocks(*a)[::-1],
    },
}
