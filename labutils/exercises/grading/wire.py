"""Messages on the socket between the grader and a student's process: values made of numbers, texts, lists and tensors.

The grader trusts nothing that a student's process sends. A message is JSON and the raw bytes of tensors. It is not a
pickle, which could run any code of the sender. Sizes are checked before anything is read.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import torch

LARGEST_HEADER = 2**20  # bytes of JSON
LARGEST_MESSAGE = 2**28  # bytes of tensors
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}


class Garbled(Exception):
    """What came is not a message of this protocol."""


def send(channel: socket.socket, message: Any) -> None:
    """Sends a value made of None, booleans, numbers, strings, lists, tuples, dicts and tensors.

    Raises:
        ValueError: the value is too large.
        OSError: the other side is gone.
    """
    blobs: list[bytes] = []
    header = json.dumps(_packed(message, blobs)).encode()
    if len(header) > LARGEST_HEADER or sum(map(len, blobs)) > LARGEST_MESSAGE:
        raise ValueError("The value is too large to be sent.")
    channel.sendall(struct.pack(">QQ", len(header), sum(map(len, blobs))) + header + b"".join(blobs))


def receive(channel: socket.socket, deadline: float | None = None, meanwhile: Callable[[], None] | None = None) -> Any:
    """The next value.

    Args:
        channel: the socket.
        deadline: when to give up, on the clock of `time.monotonic`.
        meanwhile: called about five times a second.

    Raises:
        TimeoutError: the deadline passed.
        EOFError: the other side is gone.
        Garbled: what came is not a message.
    """
    sizes = struct.unpack(">QQ", _exactly(channel, 16, deadline, meanwhile))
    if sizes[0] > LARGEST_HEADER or sizes[1] > LARGEST_MESSAGE:
        raise Garbled(f"a message of {sizes[0]:,} and {sizes[1]:,} bytes is too large")
    header = _exactly(channel, sizes[0], deadline, meanwhile)
    body = _exactly(channel, sizes[1], deadline, meanwhile)
    try:
        return _unpacked(json.loads(header), body)
    except Garbled:
        raise
    except Exception as error:  # wrong JSON, types or lengths, or endless nesting
        raise Garbled(f"{type(error).__name__}: {str(error)[:100]}") from None


def _exactly(channel: socket.socket, count: int, deadline: float | None, meanwhile: Callable[[], None] | None) -> bytes:
    """The next `count` bytes."""
    parts, missing = [], count
    while missing:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
        channel.settimeout(0.2 if deadline is not None or meanwhile is not None else None)
        try:
            part = channel.recv(min(missing, 2**20))
        except TimeoutError:
            part = None
        except OSError:
            raise EOFError from None
        if meanwhile is not None:
            meanwhile()
        if part is None:
            continue
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _packed(value: Any, blobs: list[bytes]) -> Any:
    """The value as JSON; the bytes of its tensors are appended to `blobs`."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in _DTYPES or value.layout != torch.strided:
            return {"other": f"a tensor of dtype {name}"}
        stride = list(value.stride())
        value = value.detach().cpu()
        blobs.append(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {"tensor": [name, list(value.shape), stride, len(blobs[-1])]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_packed(item, blobs) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[str(key), _packed(item, blobs)] for key, item in value.items()]}
    return {"other": f"a {type(value).__name__}"}


class Unsendable:
    """Stands for a value that the other side could not send; its `repr` says what the value was."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _unpacked(packed: Any, body: bytes) -> Any:
    """The value of a message from its JSON and the bytes of its tensors; raises Garbled, among others."""
    place = 0

    def one(packed: Any) -> Any:
        nonlocal place
        if not isinstance(packed, dict) or len(packed) != 1:
            raise Garbled("not a packed value")
        kind, content = next(iter(packed.items()))
        if kind == "plain" and (content is None or isinstance(content, bool | int | float | str)):
            return content
        if kind in ("list", "tuple") and isinstance(content, list):
            items = [one(item) for item in content]
            return tuple(items) if kind == "tuple" else items
        if kind == "dict" and isinstance(content, list):
            return {str(key): one(item) for key, item in content}
        if kind == "other":
            return Unsendable(str(content)[:100])
        if kind != "tensor":
            raise Garbled(f"unknown kind {str(kind)[:20]!r}")
        name, shape, stride, length = content
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in [*shape, *stride, length]):
            raise Garbled("sizes must be integers")
        dtype = _DTYPES[name]
        if len(shape) != len(stride) or math.prod(shape) * dtype.itemsize != length or place + length > len(body):
            raise Garbled("a tensor with other bytes than its shape has")
        tensor = torch.frombuffer(bytearray(body[place : place + length]), dtype=torch.uint8) if length else None
        place += length
        dense = torch.empty(shape, dtype=dtype) if tensor is None else tensor.view(dtype).reshape(shape)
        if not length or dense.stride() == tuple(stride):
            return dense
        extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if extent > LARGEST_MESSAGE or extent < dense.numel():
            return dense
        return torch.empty_strided(shape, stride, dtype=dtype).copy_(dense)

    return one(packed)
