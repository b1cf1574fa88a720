"""One kernel twice, the scores of the next tile computed ahead: P written before the wait, and behind it. A process.

Triton waits for the scores, and with them for the product with V of the tile before. In `early` P, which that product
reads from registers, is written before that wait: a race with Triton 3.6 to 3.8. In `late` it is written behind it.

Prints both, compiled for 9.0, as JSON: cubins in base64. It imports no labutils, which may switch the interpreter on.
"""

import base64
import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def rotated(q, k, v, out, n, EARLY: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    tile = rows * D + cols
    q_tile = tl.load(q + tile)
    s = tl.dot(q_tile, tl.trans(tl.load(k + tile)))
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=2):
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.math.exp2(s - m_new[:, None])
        alpha = tl.math.exp2(m - m_new)
        if EARLY:
            p = p.to(q_tile.dtype)
        s = tl.dot(q_tile, tl.trans(tl.load(k + (start + BLOCK) * D + tile)))
        acc = tl.dot(p.to(q_tile.dtype), tl.load(v + start * D + tile), acc * alpha[:, None])
        m = m_new
    tl.store(out + tile, acc)


def compiled(early: bool) -> str:
    signature = dict.fromkeys("qkv", "*fp16") | {"out": "*fp32", "n": "i32"}
    constants = {"EARLY": early, "BLOCK": 64, "D": 64}
    places = {(rotated.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = ASTSource(rotated, signature | dict.fromkeys(constants, "constexpr"), places, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    return base64.b64encode(kernel.asm["cubin"]).decode()


if __name__ == "__main__":
    print(json.dumps({"early": compiled(True), "late": compiled(False)}))
