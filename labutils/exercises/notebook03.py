"""Checks of notebook 03: two lengths, a mask of documents, rotary positions, an out-of-memory error, a chunked loss."""

from __future__ import annotations

import math

import torch

from labutils.exercises.core import Call, Wrong, draw, exercise, integer, pick
from labutils.exercises.judging import (
    dtype_name,
    expect_number,
    expect_tensor,
    expect_values,
    indices,
    mismatch,
    same_number,
    same_tensor,
)


@exercise(
    "03",
    "A length that the logits allow",
    2,
    [
        "One token takes 3 · 4 · vocab bytes of logits, and there are gib · 2³⁰ bytes for them.",
        "How often does the first number go into the second? A sequence has whole tokens: round down, with //.",
    ],
)
def logits_length(call: Call, generator: torch.Generator) -> None:
    """The largest N whose logits fit into a number of GiB, three times in float32."""
    for gib, vocab in ((8, 50257), (3, integer(generator, 40_000, 90_000)), (1, integer(generator, 1000, 3000))):
        token = 12 * vocab
        right = gib * 2**30 // token
        same_number(
            call(gib, vocab),
            right,
            "the length N",
            f"{gib} GiB and a vocabulary of {vocab:,}",
            {
                "One more than fits: round down.": right + 1,
                "That is not an integer: a sequence has whole tokens. Round down.": gib * 2**30 / token,
                "The logits were counted once: three copies in float32 are alive at the peak.": gib
                * 2**30
                // (4 * vocab),
                "A number in float32 has 4 bytes.": gib * 2**30 // (3 * vocab),
                "That is for 16 bits: the three copies are in float32, 4 bytes a number.": gib * 2**30 // (6 * vocab),
                "1 GiB is 2³⁰ bytes, not 10⁹.": gib * 10**9 // token,
            },
        )


@exercise(
    "03",
    "Where the scores overtake the logits",
    5,
    [
        (
            "In the ledger, scores take layers · heads · N² · 6 bytes (P in float32 and its 16-bit copy), and logits"
            " 3 · 4 · N · vocab bytes."
        ),
        "Set them equal and solve for N. Then take the next larger integer: equal is not yet overtaken.",
    ],
)
def overtaking_length(call: Call, generator: torch.Generator) -> None:
    """The smallest N at which standard attention's scores take more bytes than the logits."""
    models = [
        (12, 12, 50257),
        (24, 16, 50257),
        (integer(generator, 3, 40), pick(generator, [7, 11, 13]), 32003),
        (6, 8, 48 * 500),
    ]
    for layers, heads, vocab in models:
        right = 2 * vocab // (layers * heads) + 1
        same_number(
            call(layers, heads, vocab),
            right,
            "the length N",
            f"{layers} layers, {heads} heads, a vocabulary of {vocab:,}",
            {
                "At that N the logits are still as large or larger: take the next larger integer.": right - 1,
                "That is not an integer: take the first integer at which the scores are larger.": (
                    2 * vocab / (layers * heads)
                ),
                "That is the length plus 1 before rounding down: a sequence has whole tokens.": (
                    2 * vocab / (layers * heads) + 1
                ),
                "The layers are missing: the scores of each layer are kept.": 2 * vocab // heads + 1,
                "The heads are missing: each head has its own scores.": 2 * vocab // layers + 1,
                "P was counted only in float32: its 16-bit copy is kept as well, 4 + 2 bytes.": (
                    3 * vocab // (layers * heads) + 1
                ),
                "P was counted only in 16 bits: the softmax keeps it in float32 as well, 4 + 2 bytes.": (
                    6 * vocab // (layers * heads) + 1
                ),
                "The logits were counted once: three copies in float32 are alive at the peak.": (
                    2 * vocab // (3 * layers * heads) + 1
                ),
            },
        )


@exercise(
    "03",
    "A mask that keeps documents apart",
    10,
    [
        "Which document does token i belong to? The number of borders in cu_seqlens[1:] that are <= i.",
        "torch.bucketize(tokens, cu_seqlens[1:], right=True) counts them, for all tokens at once.",
        "document[:, None] == document[None, :] says which pairs share one; & with the causal mask, columns <= rows.",
    ],
)
def document_mask(call: Call, generator: torch.Generator) -> None:
    """A mask (N, N), bool, True where query i may see key j: in the same document, and not later."""
    lengths = [3, 1, 5, integer(generator, 2, 6)]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    for cu_seqlens in (torch.tensor([0, 6], dtype=torch.int32), borders):
        n = int(cu_seqlens[-1])
        token = torch.arange(n)

        def document_of(edges, right=True, token=token):
            return torch.bucketize(token, edges, right=right)

        def together(document):
            return document[:, None] == document[None, :]

        document = document_of(cu_seqlens[1:])
        causal = token[None, :] <= token[:, None]
        right = together(document) & causal
        got = expect_tensor(call(cu_seqlens, n), (n, n), "The mask")
        if got.dtype != torch.bool:
            raise Wrong(f"The mask must be boolean; it has the dtype {dtype_name(got.dtype)}.")
        if torch.equal(got, right):
            continue
        mistakes = {
            "True and False are exchanged: True is where a query may look.": ~right,
            "That is only the causal mask: a document must not see the document before it.": causal,
            "The documents are apart, but queries see later tokens of theirs: j <= i is missing.": together(document),
            "Rows and columns are exchanged: queries see later tokens, not earlier ones.": right.T,
            (
                "The borders are off by one: cu_seqlens[d] is the first token of document d, not the last token of "
                "document d - 1 (with bucketize: right=True)."
            ): (together(document_of(cu_seqlens[1:], right=False)) & causal),
            "A token must see itself: j <= i, not j < i.": together(document) & (token[None, :] < token[:, None]),
        }
        why = next((text for text, mask in mistakes.items() if torch.equal(got, mask)), "")
        i, j = (got != right).nonzero()[0].tolist()
        raise mismatch(
            f"The mask is not right for cu_seqlens = {cu_seqlens.tolist()}, first at query {i} (document {document[i]})"
            f" and key {j} (document {document[j]}).",
            str(bool(right[i, j])),
            str(bool(got[i, j])),
            why,
        )


@exercise(
    "03",
    "Rotary positions",
    15,
    [
        "i runs from 0 to D/2 - 1. The angle of token n and pair i is positions[n] · base^(-2i/D): shape (N, D/2).",
        "Pair i is x[..., i] and x[..., i + D/2]: one from the first half of the dimensions, one from the second.",
        (
            "first · cos - second · sin, then second · cos + first · sin, joined by torch.cat(..., dim=-1). cos and"
            " sin need an axis for the heads: cos[:, None, :]."
        ),
    ],
)
def rope(call: Call, generator: torch.Generator) -> None:
    """x (N, H, D) rotated by its positions; dimension i is paired with i + D/2."""
    n, heads, head_dim = 9, 2, 8
    x = draw(generator, n, heads, head_dim)
    for case, positions, base in (
        ("positions 0 to 8", torch.arange(n), 10000.0),
        ("positions that start again at the second document", torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3]), 10000.0),
        ("positions 500 to 508 and base 100", torch.arange(n) + 500, 100.0),
    ):

        def rotated(exponent=2.0, sign=1.0, place=positions, pairs="halves", base=base, dtype=torch.float32, unit=1.0):
            half = torch.arange(head_dim // 2, dtype=torch.float64)
            angle = (unit * place.double()[:, None] * base ** (-exponent * half / head_dim)).to(dtype)[:, None, :]
            cos, sin = angle.cos(), sign * angle.sin()
            source = x.to(dtype)
            if pairs == "halves":
                a, b = source.chunk(2, dim=-1)
                return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
            a, b = source[..., 0::2], source[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

        frequency = base ** (-2 * torch.arange(head_dim // 2) / head_dim)
        angle32 = (positions[:, None] * frequency)[:, None, :]  # as a right answer in float32 computes it
        a, b = x.chunk(2, dim=-1)
        low = torch.cat([a * angle32.cos() - b * angle32.sin(), b * angle32.cos() + a * angle32.sin()], dim=-1)
        exchanged = torch.cat([a * angle32.sin() - b * angle32.cos(), b * angle32.sin() + a * angle32.cos()], dim=-1)
        got = expect_tensor(call(x, positions, base), x.shape, "The result")
        exact = rotated(dtype=torch.float64)
        # an angle of 500 in float32 is known to 3e-5: allow that error to any right answer
        same_tensor(
            got,
            exact,
            low + 1e-4 * (low - exact).sign(),
            name="rotated x",
            requirement=f"The rotation is not right for {case}.",
            place=indices("token", "head", "dimension"),
            closeness=2.0,
            mistakes={
                "Neighbours were paired, x[2i] with x[2i + 1]: here x[i] goes with x[i + D/2].": rotated(
                    pairs="neighbours"
                ),
                "The rotation runs backwards: the sine that is subtracted belongs to the first half.": rotated(
                    sign=-1.0
                ),
                "The exponent is -i/D, not -2i/D: the frequencies fall too slowly.": rotated(exponent=1.0),
                "The exponent has the wrong sign: frequencies fall with i.": rotated(exponent=-2.0),
                "The token's index was taken as its position: use `positions`.": rotated(place=torch.arange(n)),
                "Positions count from 0 here, not from 1.": rotated(place=positions + 1),
                "x came back as it was.": x,
                "Sine and cosine are exchanged: position 0 must not turn anything.": exchanged,
                "The halves stand in the wrong order: the first half of the result belongs to the first half of x.": (
                    torch.cat(low.chunk(2, dim=-1)[::-1], dim=-1)
                ),
                "Only the first half was turned: x[i + D/2] changes as well.": torch.cat(
                    [low.chunk(2, dim=-1)[0], b], dim=-1
                ),
                "A sign is wrong: the first half gets first · cos - second · sin.": torch.cat(
                    [a * angle32.cos() + b * angle32.sin(), low.chunk(2, dim=-1)[1]], dim=-1
                ),
                "Angles in degrees: cos and sin take radians, as the formula gives them.": rotated(unit=math.pi / 180),
                "Angles multiplied by 2π: the formula gives radians already.": rotated(unit=2 * math.pi),
                "The exponent is -2i, not -2i/D: the frequencies fall too fast.": rotated(exponent=2.0 * head_dim),
            },
        )


_UNITS = {"GiB": 1.0, "MiB": 2**-10}


@exercise(
    "03",
    "Read an out-of-memory error",
    10,
    [
        (
            "Three sizes matter: 'Tried to allocate ...', '... is free', and '... is reserved by PyTorch but"
            " unallocated'."
        ),
        "re.search(r'Tried to allocate ([\\d.]+) (MiB|GiB)', message) finds number and unit; 1 GiB is 1,024 MiB.",
        (
            "missing = asked - free. The verdict is 'fragments' if free memory and the unallocated reserve together"
            " would have been enough, asked <= free + reserve, otherwise 'too much'."
        ),
    ],
)
def read_oom(call: Call, generator: torch.Generator) -> None:
    """(missing GiB, "fragments" or "too much"), read from PyTorch's message."""
    cases = [
        (64.0, "GiB", 42.5, "GiB", 1.5, "GiB"),
        (6.0, "GiB", 2.25, "GiB", 5.5, "GiB"),
        (9.0, "GiB", 512.0, "MiB", 768.0, "MiB"),
    ]
    asked = integer(generator, 600, 900)
    cases += [(float(asked), "MiB", 100.0, "MiB", 300.0, "MiB"), (float(asked), "MiB", 500.0, "MiB", 1.25, "GiB")]
    for ask, ask_unit, free, free_unit, idle, idle_unit in cases:
        message = (
            f"CUDA out of memory. Tried to allocate {ask:.2f} {ask_unit}. GPU 0 has a total capacity of 79.25 GiB of"
            f" which {free:.2f} {free_unit} is free. Including non-PyTorch memory, this process has 36.73 GiB memory"
            f" in use. Of the allocated memory 30.11 GiB is allocated by PyTorch, and {idle:.2f} {idle_unit} is"
            " reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting"
            " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
        )
        a, f, i = ask * _UNITS[ask_unit], free * _UNITS[free_unit], idle * _UNITS[idle_unit]
        right = "fragments" if a <= f + i else "too much"
        missing, verdict = expect_values(call(message), ("missing GiB", "the verdict"))
        missing = expect_number(missing, "the GiB that were missing")
        case = (
            f"{ask:.2f} {ask_unit} asked, {free:.2f} {free_unit} free, {idle:.2f} {idle_unit} reserved but unallocated"
        )
        if abs(missing - (a - f)) > 0.006:
            known = {
                "The units were ignored: some of these sizes are in MiB.": ask - free,
                "That is what was asked for, and a part of it was free.": a,
                "That counts from the GPU's total capacity: count from what is free.": a - 79.25,
                "The sign is wrong: asked - free.": f - a,
                "The reserve was subtracted, too. Missing is asked - free; the reserve only decides the verdict.": (
                    a - f - i
                ),
                "That is in MiB; GiB were asked for.": (a - f) * 2**10,
                "1 GiB is 1,024 MiB, not 1,000.": (
                    ask * (1e-3 if ask_unit == "MiB" else 1) - free * (1e-3 if free_unit == "MiB" else 1)
                ),
            }
            if any(missing == round(a - f, digits) for digits in (0, 1)):
                known = {"That is rounded: give two decimals or more.": missing}
            why = next((text for text, value in known.items() if abs(missing - value) < 1e-6), "")
            raise mismatch(f"The missing memory is not right for {case}.", f"{a - f:.4g} GiB", f"{missing:.4g}", why)
        if verdict != right:
            if verdict not in ("fragments", "too much"):
                why = "It must be 'fragments' or 'too much'."
            elif right == "fragments":
                why = "Free memory and the reserve together would have been enough: the reserve lies in pieces."
            else:
                why = "Even the whole reserve would not have been enough."
            raise mismatch(f"The verdict is not right for {case}.", repr(right), repr(verdict), why)


@exercise(
    "03",
    "A loss that never holds all logits",
    30,
    [
        (
            "For a chunk: logits = hidden[i : i + chunk] @ weight.T. The loss of a token is logsumexp(logits) -"
            " logits[target]. Sum over all chunks, and divide by the number of all tokens at the very end."
        ),
        "The gradient of the summed loss with respect to the logits is softmax(logits), minus 1 at the target.",
        (
            "With g = (softmax - onehot) / N, d_hidden of the chunk is g @ weight, and the chunk adds g.T @ h to"
            " d_weight, where h is its part of hidden."
        ),
    ],
)
def chunked_loss(call: Call, generator: torch.Generator) -> None:
    """(mean cross-entropy, its gradients by hidden and by weight), with the logits of one chunk at a time."""
    for n, chunk, scale in ((24, 8, 1.0), (21, 8, 1.0), (21, 30, 1.0), (19, 6, 30.0)):
        _try_loss(call, generator, n, chunk, scale)
    hidden, weight = draw(generator, 512, 8), draw(generator, 64, 8)
    targets = torch.randint(64, (512,), generator=generator)
    call(hidden, weight, targets, 32)
    if call.largest >= 512 * 64 // 2:
        raise Wrong(
            "The results are right, but the logits of all tokens must never exist at once.\n  With N = 512, V = 64"
            f" and chunks of 32 the largest tensor has {call.largest:,} elements. There are {512 * 64:,} logits, and"
            f" {32 * 64:,} in a chunk.\n  Compute logits, loss and gradient of one chunk inside the loop."
        )


def _try_loss(call, generator, n, chunk, scale) -> None:
    vocab, width = 10, 6
    hidden, weight = draw(generator, n, width) * scale, draw(generator, vocab, width)
    targets = torch.randint(vocab, (n,), generator=generator)
    case = f"N = {n}, chunks of {chunk}" + (", large logits" if scale > 1 else "")
    results = expect_values(call(hidden, weight, targets, chunk), ("loss", "d_hidden", "d_weight"))
    loss = expect_tensor(results[0], (), "loss")
    d_hidden, d_weight = (
        expect_tensor(results[1], hidden.shape, "d_hidden"),
        expect_tensor(results[2], weight.shape, "d_weight"),
    )

    losses, g = _losses(hidden.double(), weight.double(), targets)
    low_losses, low_g = _losses(hidden, weight, targets)
    same_tensor(
        loss,
        losses.mean(),
        low_losses.mean(),
        name="loss",
        requirement=f"The loss is not right for {case}.",
        place=lambda index: "the mean over all tokens",
        mistakes=_loss_mistakes(hidden, weight, targets, chunk, losses),
    )
    of_hidden, of_weight = _gradient_mistakes(hidden, weight, targets, chunk, g)
    for name, got, exact, low, mistakes in (
        ("d_hidden", d_hidden, g @ weight.double(), low_g @ weight, of_hidden),
        ("d_weight", d_weight, g.T @ hidden.double(), low_g.T @ hidden, of_weight),
    ):

        def place(index: tuple[int, ...], name: str = name) -> str:
            token = f"token {index[0]} (chunk {index[0] // chunk})"
            row = token if name == "d_hidden" else f"vocabulary entry {index[0]}"
            return f"{row}, dimension {index[1]}"

        same_tensor(
            got,
            exact,
            low,
            name=name,
            requirement=f"The loss is right, {name} is not, for {case}.",
            place=place,
            mistakes=mistakes,
            factor=3.0,
            atol=1e-5 * (1.0 if scale == 1.0 else 100.0),  # logits near 200 are known only to 1e-5
        )


def _losses(hidden, weight, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each token, (N,), and the gradient of their mean by the logits, (N, V), in the inputs' dtype."""
    logits = hidden @ weight.T
    losses = logits.logsumexp(dim=-1) - logits.gather(1, targets[:, None])[:, 0]
    g = logits.softmax(dim=-1)
    g[torch.arange(len(g)), targets] -= 1
    return losses, g / len(g)


def _loss_mistakes(hidden, weight, targets, chunk, losses) -> dict[str, torch.Tensor]:
    """Message -> the loss that this mistake returns; `losses` are the exact losses of the tokens, (N,)."""
    n = len(losses)
    pieces = list(range(0, n, chunk))
    last, whole = pieces[-1], n // chunk * chunk
    naive = (hidden @ weight.T).exp()
    wrong = {
        "e^logit overflowed: use torch.logsumexp, or subtract the maximum.": (
            (naive.sum(dim=-1).log() - (hidden @ weight.T).gather(1, targets[:, None])[:, 0]).mean()
        ),
        (
            "That is the mean of the chunks' means: the tokens of the last, shorter chunk count for more. Sum, and "
            "divide by N once."
        ): (torch.stack([losses[i : i + chunk].mean() for i in pieces]).mean()),
        "That is the sum over the tokens: the loss is their mean.": losses.sum(),
        "That is the loss of only the last chunk: add the chunks up.": losses[last:].sum() / n,
        "That is the mean over only the last chunk.": losses[last:].mean(),
        "The sign is wrong: the loss is logsumexp(logits) - logits[target].": -losses.mean(),
        "In base 2: the logarithms of the loss are natural.": losses.mean() / math.log(2),
        "The logit of the target was not subtracted.": ((hidden.double() @ weight.double().T).logsumexp(dim=-1).mean()),
    }
    if whole < n and whole:
        wrong["The last, shorter chunk was left out, and the rest was divided by its own number of tokens."] = losses[
            :whole
        ].mean()
        wrong["The last, shorter chunk was left out: its tokens add nothing."] = losses[:whole].sum() / n
    return wrong


def _gradient_mistakes(hidden, weight, targets, chunk, g) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Message -> the d_hidden, and the d_weight, that this mistake returns; `g` is the exact gradient by the logits."""
    n, h, w = len(g), hidden.double(), weight.double()
    last, whole = (n - 1) // chunk * chunk, n // chunk * chunk
    p = (hidden @ weight.T).softmax(dim=-1)
    share = torch.tensor([min(chunk, n - i // chunk * chunk) for i in range(n)]).double()[:, None]
    minus = "Subtract 1 at the target: the gradient by the logits is softmax - onehot."
    mean = "That is the gradient of the sum: the loss is a mean, so divide by N."
    by_chunk = "Divided by the length of the chunk: divide by N, the number of all tokens."
    of_hidden = {
        minus: p.double() / n @ w,
        mean: g * n @ w,
        by_chunk: g * n / share @ w,
        "The sign is wrong: the gradient by the logits is softmax - onehot.": -g @ w,
    }
    of_weight = {
        minus: p.double().T / n @ h,
        mean: (g * n).T @ h,
        by_chunk: (g * n / share).T @ h,
        "That is the gradient of only the last chunk: each chunk adds to d_weight (+=).": g[last:].T @ h[last:],
        "The last, shorter chunk is missing.": g[:whole].T @ h[:whole],
        "The sign is wrong: the gradient by the logits is softmax - onehot.": -g.T @ h,
    }
    return of_hidden, of_weight
