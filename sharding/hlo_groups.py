"""Which devices take part in a collective together, as HLO spells it."""

import math
import re
from functools import cache

import numpy as np

from jaxinfer.sharding.hlo_text import Instruction, Module

__all__ = ["factors_of", "groups_of"]

Groups = tuple[tuple[int, ...], ...]

_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'([^']*)'=(\d+)")
_USED = re.compile(r"'?([^',:{}]+)'?(?::\((\d+)\)(\d+))?")


def groups_of(instruction: Instruction, module: Module, kind: str) -> Groups:
    """Groups of device ids, which are places in the mesh's flat order.

    replica_groups={{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), mesh['a'=2,'b'=4] {'b'}, mesh['a'=2,'b'=4],
    device_ids=([4,2]T(1,0)) {'a'}, or {}: all. A collective-permute's groups are the devices that its
    source_target_pairs connect; those that only send to themselves are left out.
    """
    if kind == "collective-permute":
        return _connected(instruction.attribute("source_target_pairs") or "")
    found = re.search(r"replica_groups=", instruction.attributes)
    text = instruction.attributes[found.end() :] if found else ""
    if text.startswith("mesh"):
        return _mesh(text[: text.index("}") + 1] if "}" in text else text)
    if iota := _IOTA.match(text):
        return _grid(iota[1], iota[2] or iota[1], iota[3])
    groups = _explicit(instruction.attribute("replica_groups") or "{}")
    if not groups or not all(groups):
        return (tuple(range(module.devices)),)
    by_replica = "channel_id=" in instruction.attributes and "use_global_device_ids=" not in instruction.attributes
    if by_replica and kind != "all-to-all":
        # Ids are replicas then, each of which brings all its partitions.
        n = module.partitions
        return tuple(tuple(replica * n + p for replica in group for p in range(n)) for group in groups)
    return groups


def factors_of(group: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(size, stride) pairs, the smallest stride first, whose sums are the group's ids less its first.

    An irregular group counts as evenly spaced.
    """
    ids = sorted(group)
    offsets, factors, done = [i - ids[0] for i in ids], [], 1
    while done < len(ids):
        stride = offsets[done]
        n = 1
        while n * done < len(ids) and offsets[n * done] == n * stride:
            n += 1
        factors.append((n, stride))
        done *= n
    sums = [0]
    for n, stride in factors:
        sums = [s + k * stride for k in range(n) for s in sums]
    if sums == offsets:
        return tuple(factors)
    return ((len(ids), max(1, offsets[-1] // (len(ids) - 1))),)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@cache
def _explicit(text: str) -> Groups:
    return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([^{}]*)\}", text))


@cache
def _grid(shape: str, source: str, transposed: str | None) -> Groups:
    ids = np.arange(math.prod(_numbers(source))).reshape(_numbers(source))
    if transposed:
        ids = ids.transpose(_numbers(transposed))
    rows = ids.reshape(_numbers(shape)[0], -1)
    return tuple(tuple(int(i) for i in row) for row in rows)


@cache
def _mesh(text: str) -> Groups:
    axes = [(name, int(size)) for name, size in _AXIS.findall(text[: text.index("]")])]
    ids = np.arange(math.prod(size for _, size in axes))
    ordered = re.search(r"device_ids=\((.*?)\)\s*\{", text)
    if ordered and (iota := _IOTA.match(ordered[1])):
        ids = np.array([i for row in _grid(f"1,{ids.size}", iota[2] or iota[1], iota[3]) for i in row])
    elif ordered:
        ids = np.array(_numbers(ordered[1]))
    used = _USED.findall(text[text.rindex("{") + 1 : text.rindex("}")]) if "}" in text else []
    # An axis of which only a part is used, 'a':(before)size, counts as three.
    shape: list[int] = []
    places: dict[tuple[str, str], int] = {}
    for name, size in axes:
        cuts = sorted((int(before), int(part)) for n, before, part in used if n == name and before)
        places[name, ""] = len(shape)
        whole = 1
        for before, part in cuts:
            shape.append(before // whole)
            places[name, str(before)] = len(shape)
            shape.append(part)
            whole = before * part
        shape.append(size // whole)
    along = [places[name, before] for name, before, _ in used]
    grid = np.moveaxis(ids.reshape(shape), along, range(len(shape) - len(along), len(shape)))
    rows = grid.reshape(-1, math.prod(shape[axis] for axis in along))
    return tuple(tuple(int(i) for i in row) for row in rows)


def _connected(text: str) -> Groups:
    group: dict[int, set[int]] = {}
    for pair in _explicit(text):
        if len(set(pair)) == 2:
            joined = group.get(pair[0], {pair[0]}) | group.get(pair[1], {pair[1]})
            group |= dict.fromkeys(joined, joined)
    return tuple(sorted({tuple(sorted(members)) for members in group.values()}))
