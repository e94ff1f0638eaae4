"""The two recurrences of StateX, each spelled three ways: recurrent, chunked, Triton.

Both model families are one recurrence. Per head, with a state S of K x V numbers:

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t

    gla   Gated linear attention (Yang et al., arXiv 2312.06635, eq. 3): a_t in (0,1]^K, one decay per key channel.
    ssd   Mamba2's state space dual (Dao & Gu, arXiv 2405.21060, eq. 1): a_t one number per head, k = B and q = C are
          shared by all heads of a group, v = dt * x, and a skip D * x is added to the output.

"recurrent" is the definition: a loop over time. "chunked" does the same sums with matrix products and is the fast path
on a CPU. Decays travel as logarithms g = log a <= 0, and no path ever takes the exponential of a positive number, so any
decay is safe: none at all (g = 0) or a state that forgets everything at every step (g = -60).
"""
import torch
import torch.nn.functional as F


def gla(q, k, v, g, scale=None, state=None, impl="auto"):
    """Gated linear attention.

    q, k (B,T,H,K); v (B,T,H,V); g (B,T,H,K) log decays <= 0; state (B,H,K,V) or None for zeros.
    scale multiplies q; K**-0.5 when None.  impl: "recurrent" | "chunked" | "triton" | "auto".
    Returns o (B,T,H,V) in v's dtype and the final state (B,H,K,V) in float32 (float64 when the inputs are).
    Differentiable in q, k, v, g and state, through both results.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, state = {"recurrent": gla_recurrent, "chunked": gla_chunked, "triton": gla_triton}[pick(impl, q)](
        q, k, v, g, scale, state)
    return o.to(v.dtype), state


def ssd(x, dt, A, B, C, D=None, state=None, impl="auto"):
    """Mamba2's state space recurrence: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t.

    x (B,T,H,P); dt (B,T,H) > 0, already through softplus; A (H,) < 0; B, C (B,T,G,N) with G dividing H;
    D (H,) or None; state (B,H,P,N) or None for zeros.  impl as in gla.
    Returns y (B,T,H,P) in x's dtype and the final state (B,H,P,N) in float32 (float64 when the inputs are).
    Differentiable in every tensor, through both results.
    """
    y, state = {"recurrent": ssd_recurrent, "chunked": ssd_chunked, "triton": ssd_triton}[pick(impl, x)](
        x, dt, A, B, C, state)
    if D is not None:
        y = y + D[:, None] * x
    return y.to(x.dtype), state


def pick(impl, x):
    if impl not in ("auto", "recurrent", "chunked", "triton"):
        raise ValueError(f"impl is {impl!r}; expected 'recurrent', 'chunked', 'triton' or 'auto'")
    return impl if impl != "auto" else "triton" if x.is_cuda else "chunked"


def widen(*tensors):
    """The tensors in the arithmetic's dtype: float64 if any of them is, else float32. None stays None."""
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# recurrent: the definition


def gla_recurrent(q, k, v, g, scale, state):
    q, k, v, g, S = widen(q, k, v, g, state)
    if S is None:
        S = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])                      # (B,H,K,V)
    o = []
    for t in range(q.shape[1]):
        S = g[:, t, :, :, None].exp() * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return torch.stack(o, dim=1), S


def ssd_recurrent(x, dt, A, B, C, state):
    x, dt, A, B, C, S = widen(x, dt, A, B, C, state)
    heads = x.shape[2] // B.shape[2]                                                # heads that share one B and C
    B, C = B.repeat_interleave(heads, dim=2), C.repeat_interleave(heads, dim=2)     # (B,T,H,N)
    if S is None:
        S = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])                      # (B,H,P,N)
    y = []
    for t in range(x.shape[1]):
        a = torch.exp(dt[:, t] * A)[:, :, None, None]
        S = a * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        y.append(torch.einsum("bhpn,bhn->bhp", S, C[:, t]))
    return torch.stack(y, dim=1), S


# ---------------------------------------------------------------------------------------------------------------------
# chunked: matrix products inside chunks of C tokens, one state handed from chunk to chunk


def gla_chunked(q, k, v, g, scale, state, C=32):
    """Inside a chunk, o_i sums q_i . k_j exp(g_{j+1} + ... + g_i) v_j over j <= i, with a decay for every channel.

    Blocks of 1, 2, 4, ... C tokens are merged in pairs. When two neighbours of h tokens merge, the queries of the right
    one meet the keys of the left one, and the decay between them splits at the seam: from key j to the end of the left
    block (`after`), and from the start of the right block to query i (`upto`). Both are sums of g over part of one block,
    so both are <= 0 and exact however large the decay elsewhere is. log2(C) levels, one exponential a token each.
    """
    q, k, v, g, S = widen(q, k, v, g, state)
    (b, T, H, K), V = q.shape, v.shape[-1]
    C = min(C, 1 << (T - 1).bit_length())
    n = -(-T // C)

    def blocks(x):                                        # (B,T,H,D) -> (B,H,T',1,D): padding has k = v = 0 and g = 0
        return F.pad(x, (0, 0, 0, 0, 0, n * C - T)).transpose(1, 2).unsqueeze(-2)

    q, k, v, upto = blocks(q * scale), blocks(k), blocks(v), blocks(g)
    after = torch.zeros_like(upto)
    o = (q * k).sum(-1, keepdim=True) * v
    for _ in range(C.bit_length() - 1):
        (q0, q1), (k0, k1), (v0, v1), (o0, o1), (u0, u1), (a0, a1) = (
            x.unflatten(2, (-1, 2)).unbind(3) for x in (q, k, v, o, upto, after))       # each (B,H,n,h,D): left, right
        scores = (q1 * u1.exp()) @ (k0 * a0.exp()).mT                                   # (B,H,n,h,h)
        o = torch.cat((o0, o1 + scores @ v0), dim=3)
        upto = torch.cat((u0, u1 + u0[..., -1:, :]), dim=3)
        after = torch.cat((a0 + u1[..., -1:, :], a1), dim=3)
        q, k, v = (x.reshape(*o.shape[:4], -1) for x in (q, k, v))

    q, writes = q * upto.exp(), (k * after.exp()).mT @ v                                    # (B,H,n,K,V) a chunk adds
    decay = upto[..., -1, :, None].exp()                                                    # (B,H,n,K,1) a chunk forgets
    S = q.new_zeros(b, H, K, V) if S is None else S
    before = []
    for c in range(n):
        before.append(S)
        S = decay[:, :, c] * S + writes[:, :, c]
    o = o + q @ torch.stack(before, dim=2)
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), S


def ssd_chunked(x, dt, A, B, C, state, L=64):
    """Inside a chunk of L tokens, y_i sums (C_i . B_j) exp(g_{j+1} + ... + g_i) dt_j x_j over j <= i, g = dt A.

    One decay a head: the exponents form an L x L table a head, and C B^T is computed once for all heads of a group.
    The cumulative sums are taken in float64: differences of large float32 sums would lose the small decays.
    """
    x, dt, A, B, C, S = widen(x, dt, A, B, C, state)
    (b, T, H, P), (G, N) = x.shape, B.shape[2:]
    L = min(L, T)
    n, M = -(-T // L), H // G                                                       # chunks, heads in a group
    pad = n * L - T

    g = F.pad(dt * A, (0, 0, 0, pad)).double().view(b, n, L, G, M).permute(0, 3, 1, 4, 2).cumsum(-1)     # (B,G,n,M,L)
    v = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad)).view(b, n, L, G, M, P).permute(0, 3, 1, 4, 2, 5)  # (B,G,n,M,L,P)
    B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)).view(b, n, L, G, N).permute(0, 3, 1, 2, 4) for t in (B, C))   # (B,G,n,L,N)

    later = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)             # key j after query i: not seen
    between = (g[..., :, None] - g[..., None, :]).to(x.dtype).masked_fill(later, -torch.inf)             # i, j
    y = ((C @ B.mT).unsqueeze(3) * between.exp()) @ v                               # (B,G,n,M,L,P)

    to_end = (g[..., -1:] - g).to(x.dtype).exp()[..., None]                         # (B,G,n,M,L,1)
    rows = (to_end * v).transpose(3, 4).reshape(b, G, n, L, M * P)
    writes = (rows.mT @ B).view(b, G, n, M, P, N)
    decay = g[..., -1].to(x.dtype).exp()[..., None, None]                           # (B,G,n,M,1,1)
    S = x.new_zeros(b, G, M, P, N) if S is None else S.view(b, G, M, P, N)
    before = []
    for c in range(n):
        before.append(S)
        S = decay[:, :, c] * S + writes[:, :, c]
    before = torch.stack(before, dim=2).view(b, G, n, M * P, N)
    carried = (C @ before.mT).view(b, G, n, L, M, P).transpose(3, 4)                # (B,G,n,M,L,P)
    y = y + g.to(x.dtype).exp()[..., None] * carried
    return y.permute(0, 2, 4, 1, 3, 5).reshape(b, n * L, H, P)[:, :T], S.view(b, H, P, N)


def gla_triton(*args):
    raise NotImplementedError("impl='triton' is not built yet; use impl='chunked'")


ssd_triton = gla_triton
