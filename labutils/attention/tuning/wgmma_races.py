"""Finds a race in the machine code of a kernel for Hopper: a write to a register that a running product still reads.

A product of Hopper's tensor cores (`wgmma`, HGMMA in machine code) is started, and the kernel goes on. Until the kernel
waits for the product, it must not write the product's accumulators, nor a left operand that lies in registers. Triton
waits for a product before its result is used. But a loop may end with a product whose left operand is in registers,
and compute the next such operand before it waits again: then nothing waits for the operand. ptxas does not see it. It
looks for such writes between a product and its wait, and here the loop begins again in between. The result is right or
NaN, depending on the registers. Triton 3.6 to 3.8 compile it so. Triton 3.9 moves the operand to other registers after
the wait.

A loop of ours is safe if its first product is used at once (as the scores are) and all operands of the later products
are computed from it. `overwritten` reads the compiled kernel, and finds the writes that are not safe.

Source: PTX ISA, "Asynchronous warpgroup level matrix instructions", on accessing registers before `wgmma.wait_group`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_REGISTER = re.compile(r"R(\d+)\b")
_PREDICATE = re.compile(r"U?P(\d|T)$")
_WAIT = re.compile(r"gsb0,\s*(0x[0-9a-f]+)")

_A_REGISTERS = 4  # of a thread, for 64 rows of 32 bytes: what one instruction takes of its left operand
_MANY = {"64": 2, "128": 4, "WIDE": 2, "4": 4, "2": 2}  # registers written, by what an opcode ends with


class Instruction(NamedTuple):
    """One instruction of a kernel."""

    address: int
    predicate: str | None
    opcode: str
    operands: str

    def __str__(self) -> str:
        return f"{self.address:#06x} {self.opcode} {self.operands}".rstrip()

    def writes(self) -> range:
        """Numbers of the registers that it writes, beginning with its first operand that is not a predicate."""
        for operand in self.operands.split(",")[:2]:
            operand = operand.strip()
            if match := _REGISTER.match(operand):
                first = int(match[1])
                return range(first, first + self._width())
            if not _PREDICATE.match(operand):
                break
        return range(0)

    def _width(self) -> int:
        name, *modifiers = self.opcode.split(".")
        if name == "CS2R" and "32" not in modifiers:
            return 2
        if name == "HMMA":  # a product of older tensor cores: of its 16 x 8 numbers a thread has four
            return 4 if "F32" in modifiers else 2
        if name.startswith(("LD", "IMAD", "ATOM", "F2F", "UIMAD")):
            return max((_MANY.get(modifier, 1) for modifier in modifiers), default=1)
        return 2 if re.fullmatch(r"D(ADD|MUL|FMA)", name) else 1


def machine_code(cubin: bytes) -> str:
    """The machine code of a compiled kernel as text, by `nvdisasm`, which comes with Triton.

    Raises:
        subprocess.CalledProcessError: nvdisasm cannot read it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in their order, and for each label the index of the instruction behind it."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            address, predicate, opcode, operands = match.groups()
            instructions.append(Instruction(int(address, 16), predicate, opcode, operands.strip()))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
    return instructions, labels


def _product(instruction: Instruction) -> tuple[frozenset[int], bool]:
    """Registers of a product's accumulators and left operand, and whether a group of products ends with it."""
    shape = re.search(r"\.64x(\d+)x(\d+)", instruction.opcode)
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    if shape is None or (accumulator := _REGISTER.match(operands[0])) is None:
        raise ValueError(f"a kind of product that is not known here: {instruction}")
    wide = ".F32" in instruction.opcode  # else two float16 numbers share a register
    count = int(shape[1]) // (2 if wide else 4)
    registers = set(range(int(accumulator[1]), int(accumulator[1]) + count))
    if left := _REGISTER.match(operands[1]):
        registers |= set(range(int(left[1]), int(left[1]) + _A_REGISTERS))
    return frozenset(registers), "gsb0" in instruction.operands


def count(cubin: bytes) -> int | None:
    """How many instructions `overwritten` finds in a compiled kernel; None if the kernel has no wgmma.

    Args:
        cubin: for compute capability 9.0.
    """
    text = machine_code(cubin)
    return len(overwritten(text)) if "HGMMA" in text else None


def overwritten(text: str) -> list[Instruction]:
    """Instructions that write a register of a product in flight; [] for a kernel without a race.

    It follows every path through the kernel, with the products that are in flight on it.

    Args:
        text: machine code for compute capability 9.0, as `machine_code` gives it.

    Raises:
        ValueError: the text has no instructions, or a kind of product that is not known here.
    """
    instructions, labels = _read(text)
    if not instructions:
        raise ValueError("no instructions: pass text that nvdisasm wrote.")
    found: dict[int, Instruction] = {}
    # A state: groups of products in flight, oldest first. The last group is still open, and may be empty.
    start: tuple[frozenset[int], ...] = (frozenset(),)
    seen: set[tuple[int, tuple[frozenset[int], ...]]] = set()
    paths = [(0, start)]
    while paths:
        place, state = paths.pop()
        while place < len(instructions) and (place, state) not in seen:
            seen.add((place, state))
            instruction = instructions[place]
            name = instruction.opcode.split(".")[0]
            if name == "HGMMA":
                registers, ends = _product(instruction)
                state = (*state[:-1], state[-1] | registers, *([frozenset()] if ends else []))
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                match = _WAIT.search(instruction.operands)
                may_run_on = int(match[1], 16) if match else 0
                state = (*state[:-1][max(0, len(state) - 1 - may_run_on) :], state[-1])
            elif any(register in group for register in instruction.writes() for group in state):
                found[place] = instruction
            target = _TARGET.search(instruction.operands)
            if name == "BRA" and target:
                if instruction.predicate or instruction.operands.startswith(("U", "P", "!")):
                    paths.append((place + 1, state))
                place = labels[target[1]]
            elif name in ("EXIT", "RET") and not instruction.predicate:
                break
            else:
                place += 1
    return [found[place] for place in sorted(found)]
