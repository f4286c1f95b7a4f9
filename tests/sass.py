"""What cuobjdump prints, read: a kernel's instructions, its resources, and how many bytes of its
loads are under way at once."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

Code = list[tuple[int, str, str]]  # (address, operation, operands)


def loads_in_flight(code: Code) -> int:
    """The most bytes of global loads that are under way when an instruction first needs one: in
    the loops that load, where there are some (what comes before them are weights), else anywhere.
    """
    bodies = [body for body in _loops(code) if any(op.startswith("LDG") for _, op, _ in body)]
    # Twice, for what one turn of a loop loads for the next.
    return max((_waiting(body + body) for body in bodies), default=0) or _waiting(code)


def _loops(code: Code) -> Iterator[Code]:
    """Of every branch back that closes one, all that it leads through, wherever ptxas put that."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for i, (_, operation, operands) in enumerate(code):
        # "BRA 0x10" always goes there; "@P0 BRA 0x10" and "BRA.U UP0, 0x10" may; a call returns.
        jumps = operation.startswith(("BRA", "CALL"))
        target = re.search(r"0x(\w+)$", operands) if jumps else None
        to = at.get(int(target[1], 16)) if target is not None else None
        following = [] if to is None else [to]
        leaves = operation.startswith(("BRA", "BRX", "EXIT", "RET"))
        always = operation == "BRX" or re.fullmatch(r"(0x\w+)?", operands) is not None
        if i + 1 < len(code) and not (leaves and always):
            following.append(i + 1)
        after[i] += following
        for to in following:
            before[to].append(i)
    switches = [i for i, (_, operation, _) in enumerate(code) if operation == "BRX"]
    for i in range(1, len(code)):
        if switches and not before[i]:  # a case of the switch above, or else of the first
            switch = max((s for s in switches if s < i), default=switches[0])
            after[switch].append(i)
            before[i].append(switch)

    def reached(start: int, steps: list[list[int]], stop: int | None = None) -> set[int]:
        found, left = {start}, [start]
        while left:
            i = left.pop()
            if i == stop:
                continue
            left += (new := set(steps[i]) - found)
            found |= new
        return found

    for last, following in enumerate(after):
        for first in following:
            if first < last and last in (inside := reached(first, after)):
                yield [code[i] for i in sorted(inside & reached(last, before, stop=first))]


def _waiting(code: Code) -> int:
    """From top to bottom, as if no branch were taken. Loads return in order, so whoever waits for
    one has waited for those before it."""
    most, waiting = 0, []  # (registers, bytes), oldest first
    for _, operation, operands in code:
        named = _registers(operands)
        for i in reversed(range(len(waiting))):
            if waiting[i][0] & named:
                most = max(most, sum(size for _, size in waiting))
                del waiting[: i + 1]
                break
        if operation.startswith("LDG."):
            first, size = re.match(r"(?:P\d+, )?R(\d+)", operands), width(operation)
            if first is not None:
                begin = int(first[1])
                waiting.append((set(range(begin, begin + -(-size // 4))), size))
    return max(most, sum(size for _, size in waiting))


def _registers(operands: str) -> set[int]:
    named = set()
    for number, width in re.findall(r"\bR(\d+)(?:\.(64|128))?", operands):
        count = {"": 1, "64": 2, "128": 4}[width]
        named |= set(range(int(number), int(number) + count))
    return named


def width(operation: str) -> int:
    """Bytes that a load or store moves a thread."""
    for part in operation.split(".")[1:]:
        if part in ("64", "128", "256"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


def functions(sass: str) -> Iterator[tuple[str, Code]]:
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        line = r"^\s+/\*(\w{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);"
        code = [
            # Of what leaves the line it matters whether it always does.
            (
                int(at, 16),
                op,
                (guard if op.startswith(("BRA", "EXIT", "RET")) else "") + operands.strip(),
            )
            for at, guard, op, operands in re.findall(line, body, re.M)
        ]
        yield name.strip(), code


def usage(report: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """(registers, stack, shared, local) of each function."""
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *numbers in re.findall(pattern, report):
        yield name, tuple(map(int, numbers))


def threads(elf: str) -> Iterator[tuple[str, int]]:
    """The block size that each function is compiled for."""
    for part in elf.split("\n.nv.info.")[1:]:
        bounds = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:.*\s+Value:\s*(.*)", part)
        assert bounds, f"{part.partition(chr(10))[0]} has no __launch_bounds__"
        x, y, z = (int(n, 16) for n in bounds[1].split()[:3])
        yield part.partition("\n")[0].strip(), x * y * z


def demangled(names: list[str]) -> list[str]:
    """Short enough to read: without namespaces, return type and parameters."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = [line.removeprefix("void ").rpartition("(")[0] or line for line in text.splitlines()]
    return [re.sub(r"\b(?:mnet|cuda|detail)::", "", line) for line in short]
