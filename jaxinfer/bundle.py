"""An Executable on disk: `save` writes one, `load` starts from it without the user's code.

Each program is held twice. Its machine code is taken where JAX, XLA, the kind of device and the processor are those
that made it: nothing is traced or compiled then. Otherwise its StableHLO is compiled, which jax.export keeps readable
for later versions of JAX, and for other kinds of device where no operation is bound to one.

Hostile bundles: nothing is unpickled, all JSON is checked, digests tell damage. Machine code can't be checked: loading
a bundle runs what its writer compiled, so load those of strangers with `machine_code=False`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxinfer import bundle_files, specs
from jaxinfer.aot import Ready
from jaxinfer.bundle_files import MANIFEST, WEIGHTS
from jaxinfer.bundle_manifest import MAX_BYTES, Manifest, Output, Stored, parse
from jaxinfer.bundled import Bundle, host
from jaxinfer.errors import CheckpointError
from jaxinfer.padding import Padding

if TYPE_CHECKING:
    from jaxinfer.executable import Executable

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save(executable: "Executable", path: Path, overwrite: bool) -> None:
    """See `Executable.save`."""
    executable.warm_up()  # every bucket, and what padding does to it
    with bundle_files.replaced(path, overwrite) as folder:
        digests = bundle_files.write_weights(folder / WEIGHTS, executable.params)
        weights = list(zip(specs.shapes_of(executable.params), digests, strict=True))
        data = _manifest(executable, folder, weights).to_json()
        parse(data, "this bundle")  # what is written can be read
        bundle_files.write(folder / MANIFEST, data)  # last: without it nothing loads


def _manifest(executable: "Executable", folder: Path, weights: list[Any]) -> Manifest:
    """Writes the programs, and what tells of them."""
    program, prepared, padding = executable.program, executable.prepared, executable.padding
    dtypes = [np.dtype(output.dtype).name for output in prepared.outputs]
    named, tree = jax.tree.flatten(program.output_axes)
    preludes: dict[str, Stored] = {}
    made = []
    for key, ready, operands in prepared.preludes(executable.device, executable.report):
        if key not in preludes:
            preludes[key] = _write(folder, f"prelude-{len(preludes)}", ready)
        made.append((list(preludes).index(key), operands))
    programs = enumerate(executable.programs())
    return Manifest(
        name=program.name,
        fingerprint=prepared.fingerprint,
        host=host(executable.device),
        x64=jax.config.read("jax_enable_x64"),
        params=program.abstract_params,
        inputs=program.inputs,
        outputs=jax.tree.unflatten(tree, [Output(dims, d) for dims, d in zip(named, dtypes, strict=True)]),
        buckets=executable.buckets,
        rows={axis: (axis in program.independent_axes, program.why(axis)) for axis in program.axes},
        masked=sorted(padding.masked),
        padding={(axis, to): padding.found[axis, to] for axis in program.axes for to in padding.padded_to(axis)},
        kept=prepared.kept,
        made=made,
        weights=weights,
        programs=[(sizes, _write(folder, f"program-{place}", ready)) for place, (sizes, ready) in programs],
        preludes=list(preludes.values()),
        explanation=prepared.explain(),
    )


def _write(folder: Path, name: str, ready: Ready) -> Stored:
    try:
        code = bundle_files.write(folder / f"{name}.xla", ready.to_bytes())
    except CheckpointError:  # of a bundle that this one was loaded from
        raise
    except ValueError:  # a backend that can't serialise: such a bundle compiles when it is loaded
        code = None
    return Stored(code, bundle_files.write(folder / f"{name}.stablehlo", _stablehlo(ready)))


def _stablehlo(ready: Ready) -> bytes:
    """For every platform, or where an operation is bound to one, for the executable's own."""
    reason: Exception | None = None
    for platforms in (_PLATFORMS, None):
        try:
            return ready.export(platforms)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a lowering rule of a platform that isn't here raises
            reason = error
    raise CheckpointError(
        f"this program can't be saved: it has no StableHLO that lasts ({type(reason).__name__}: {reason}). If the "
        "forward calls back into Python, take the callback out of the function that you trace."
    )


def load(path: Path, device: Any, machine_code: bool) -> tuple[Bundle, list[jax.Array], Padding]:
    """See `Executable.load`: the program, its weights on the device, and what is known of padding."""
    what = f"the bundle {str(path)!r}"
    if not path.is_dir():
        raise CheckpointError(f"{what} is no folder; Executable.save(path) makes one.")
    manifest = parse(bundle_files.read(path / MANIFEST, limit=MAX_BYTES), what)
    if manifest.x64 and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(
            f"{what} was saved with 64-bit types on, and they are off: jax.config.update('jax_enable_x64', True) first."
        )
    bundle = Bundle(path, manifest, device, machine_code)
    weights = bundle_files.read_weights(path / WEIGHTS, manifest.weights, device)
    program: Any = bundle  # all that Padding would ask a Program has been found out
    padding = Padding(program, manifest.buckets, frozenset(manifest.masked), device, dict(manifest.padding))
    return bundle, weights, padding
