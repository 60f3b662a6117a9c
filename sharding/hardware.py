"""Which hardware: by name ("tpu-v5e-8"), or the devices at hand with what was measured on them."""

import re
from collections.abc import Iterable
from typing import Any

from jaxinfer.errors import PlanError
from jaxinfer.sharding.calibration import calibrate, load_calibration
from jaxinfer.sharding.hardware_cost import COLLECTIVES, collective_line, collective_time, compute_time
from jaxinfer.sharding.hardware_table import EVERYWHERE, TABLE, Hardware, Link, table_entry

__all__ = [
    "COLLECTIVES",
    "EVERYWHERE",
    "TABLE",
    "Hardware",
    "Link",
    "calibrate",
    "collective_line",
    "collective_time",
    "compute_time",
    "hardware_of",
]

_ALIASES = {
    "a100": "a100-80gb",
    "tpu-v5litepod": "tpu-v5e",
    "tpu-v5-lite": "tpu-v5e",
    "tpu-v6-lite": "tpu-v6e",
    "tpu-v7x": "tpu-v7",
    "tpu-7x": "tpu-v7",
    "tpu7x": "tpu-v7",
    "ironwood": "tpu-v7",
    "trillium": "tpu-v6e",
}
# Google's names count TensorCores, of which these have two to a device: v4-8 is a host of four chips.
_CORES = {"tpu-v4": 2, "tpu-v5p": 2}


def hardware_of(devices: Any) -> tuple[Hardware, int]:
    """(hardware, number of devices), the links laid out for that many.

    Args:
        devices: a name, with a number after "-" or "x" ("tpu-v5e-8", "h100x8", "cpu-8"; without one, 1), or a JAX
            device, a sequence of them or a Mesh. After "-" the number counts as Google's and the clouds' names do:
            TensorCores for TPU v4 and v5p ("tpu-v5p-8" is 4 devices), devices for the rest. After "x" it always counts
            devices. Real devices give what `calibrate` measured on as many of that kind, if it did.

    Raises:
        PlanError: an unknown name or kind of device, or devices of several kinds.
    """
    if isinstance(devices, str):
        return _of_name(devices)
    if isinstance(devices, Hardware):
        return devices, 1
    grid = getattr(devices, "devices", None)  # a Mesh
    if hasattr(grid, "flat"):
        devices = list(grid.flat)  # pyright: ignore[reportOptionalMemberAccess]
    if hasattr(devices, "device_kind"):
        devices = [devices]
    if not isinstance(devices, Iterable) or not (found := list(devices)) or not hasattr(found[0], "device_kind"):
        raise PlanError(f"hardware is a name such as 'tpu-v5e-8', JAX devices or a Mesh, got {devices!r}; {_known()}")
    return _of_devices(found), len(found)


def _of_name(text: str) -> tuple[Hardware, int]:
    name = text.strip().lower().replace("_", "-").removeprefix("nvidia-")
    if ambiguous := re.fullmatch(r"a100-(40|80)", name):
        size = ambiguous[1]
        raise PlanError(f"{text!r} may mean {size} devices or {size} GB: write 'a100x{size}' or 'a100-{size}gb'")
    for candidate in (name, f"tpu-{name}"):
        if hardware := TABLE.get(_ALIASES.get(candidate, candidate)):
            return hardware.laid_out(1), 1
    match = re.fullmatch(r"(.+?)([-x×])(\d+)", name)
    if match:
        for candidate in (match[1], f"tpu-{match[1]}"):
            if hardware := TABLE.get(_ALIASES.get(candidate, candidate)):
                cores = _CORES.get(hardware.name, 1) if match[2] == "-" else 1
                count, rest = divmod(int(match[3]), cores)
                if rest or not count:
                    unit = (
                        f"TensorCores, {cores} to a device ('{match[1]}x4' counts devices)" if cores > 1 else "devices"
                    )
                    raise PlanError(
                        f"{text!r}: the number counts {unit}, got {match[3]}; give a multiple from {cores} on"
                    )
                return hardware.laid_out(count), count
    raise PlanError(f"unknown hardware {text!r}; {_known()}")


def _of_devices(devices: list[Any]) -> Hardware:
    kinds = sorted({str(device.device_kind) for device in devices})
    if len(kinds) > 1:
        raise PlanError(f"a plan is for devices of one kind, got {' and '.join(kinds)}: plan for each by itself")
    if measured := load_calibration(kinds[0], len(devices)):
        return measured
    if entry := table_entry(devices):
        return entry
    raise PlanError(
        f"no figures are known for {kinds[0]!r}; {_known()}; `jaxinfer plan --calibrate` measures these devices"
    )


def _known() -> str:
    return (
        f"known are {', '.join(sorted(TABLE))}, each with a number of devices after it, as in 'tpu-v5e-8' or 'h100x8'"
    )
