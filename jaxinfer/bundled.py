"""A program that was loaded from a bundle: what an Executable asks of a Program, without a function to trace."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

from jaxinfer import bundle_files, cache, native, specs
from jaxinfer.aot import POOL, CompileReport, Pending
from jaxinfer.bundle_manifest import Manifest, Output, Stored
from jaxinfer.errors import CheckpointError

_LOG = logging.getLogger("jaxinfer")


def host(device: Any) -> dict[str, str]:
    """What machine code is made by and for."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "backend": device.client.platform_version,
        "machine": cache.machine() if device.platform == "cpu" else "",
    }


class Bundle:
    """What a bundle knows of a program: how to call it, and where each of its programs lies. Takes the place of the
    Program and of its `passes.prepared.Prepared` in an Executable that was loaded; it has no function to trace."""

    def __init__(self, path: Path, manifest: Manifest, device: Any, machine_code: bool):
        self.path, self._manifest = path, manifest
        self.name, self.fingerprint = manifest.name, manifest.fingerprint
        self.inputs, self.abstract_params = manifest.inputs, manifest.params
        self.axes = specs.names(manifest.inputs)
        self.output_axes = jax.tree.map(lambda output: output.dims, manifest.outputs)
        self.independent_axes = frozenset(axis for axis, (known, _) in manifest.rows.items() if known)
        self.kept, self.abstract_weights = manifest.kept, [struct for struct, _ in manifest.weights]
        self._outputs: list[Output] = jax.tree.leaves(manifest.outputs)
        self._places = {tuple(sizes[name] for name in self.axes): i for i, (sizes, _) in enumerate(manifest.programs)}
        self._preludes: dict[int, StoredProgram] = {}
        self._machine_code = machine_code and self._made_here(device)

    def _made_here(self, device: Any) -> bool:
        here = host(device)
        other = [f"{key} {had} there, {here[key]} here" for key, had in self._manifest.host.items() if had != here[key]]
        if other:
            text = "%s was made elsewhere (%s): its programs are compiled from their StableHLO"
            _LOG.warning(text, self.path, "; ".join(other))
        return not other

    @property
    def params(self) -> Any:
        """The shapes of the parameters that `Executable.with_params` takes; their values aren't kept."""
        return self.abstract_params

    def with_params(self, params: Any) -> "Bundle":
        """The bundle itself, which holds no parameters."""
        del params
        return self

    def without_values(self, program: "Bundle") -> "Bundle":
        """The bundle itself, which holds no values."""
        return program

    def why(self, axis: str) -> str:
        """What was proved of the rows along a named dim when the bundle was saved: see `Program.why`."""
        return self._manifest.rows[axis][1]

    def explain(self) -> str:
        """What the passes did, as it was told when the bundle was saved."""
        return self._manifest.explanation

    @property
    def outputs(self) -> Sequence[Output]:
        """The flat outputs; each has a dtype."""
        return self._outputs

    def ready(self, sizes: Mapping[str, int], device: Any, report: CompileReport) -> "StoredProgram":
        """The program (*weights, *inputs) -> outputs of a bucket."""
        place = self._places[tuple(sizes[name] for name in self.axes)]
        inputs = [*self.abstract_weights, *jax.tree.leaves(specs.structs(self.inputs, sizes))]
        outputs = [output.struct(sizes) for output in self._outputs]
        stored = self._manifest.programs[place][1]
        return StoredProgram(self, f"program-{place}", stored, inputs, outputs, device, report)

    def preludes(self, device: Any, report: CompileReport) -> Iterator[tuple[str, "StoredProgram", Sequence[int]]]:
        """For each weight that is made of parameters: the program that makes it, and which params it takes."""
        params = jax.tree.leaves(self.abstract_params)
        made = self._manifest.made
        for (place, operands), output in zip(made, self.abstract_weights[len(self.kept) :], strict=True):
            if place not in self._preludes:
                inputs, name, stored = [params[i] for i in operands], f"prelude-{place}", self._manifest.preludes[place]
                self._preludes[place] = StoredProgram(self, name, stored, inputs, [output], device, report)
            yield str(place), self._preludes[place], operands

    def weights(self, params: Any, device: Any, report: CompileReport) -> list[jax.Array]:
        """The weights of other parameters."""
        leaves = jax.tree.leaves(params)
        weights = [jax.device_put(leaves[i], device) for i in self.kept]
        for _, program, operands in self.preludes(device, report):
            weights += program.result()(*(jax.device_put(leaves[i], device) for i in operands))
        return weights

    @property
    def machine_code(self) -> bool:
        """Whether machine code is taken."""
        return self._machine_code

    def __str__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))
        given = ", ".join(map(str, specs.leaves(self.inputs)))
        returned = ", ".join(f"{output.dtype}[{' '.join(map(str, output.dims))}]" for output in self._outputs)
        return f"{self.name}: ({given}) -> {returned}; {count:,} parameters, from the bundle {str(self.path)!r}"


class StoredProgram:
    """One program of a bundle (an aot.Ready): its machine code, loaded in the background from now on, or else its
    StableHLO, compiled when first asked for."""

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        stored: Stored,
        inputs: Sequence[jax.ShapeDtypeStruct],
        outputs: Sequence[jax.ShapeDtypeStruct],
        device: Any,
        report: CompileReport,
    ):
        self._bundle, self._name, self._stored = bundle, name, stored
        self._inputs, self._outputs, self._device, self._report = list(inputs), list(outputs), device, report
        self._compiled: Any = None
        self._pending: Pending | None = None
        self._lock = threading.Lock()
        self._loading = POOL.submit(self._loaded)
        self.origin, self.seconds = "", 0.0  # where the program came from, how long the asker waited

    def result(self) -> Any:
        """The compiled function.

        Raises:
            CheckpointError: neither its machine code nor its StableHLO can be used.
        """
        with self._lock:
            if self._compiled is None:
                started = time.perf_counter()
                self._compiled = self._loading.result()
                if self._compiled is not None:
                    self.origin = "the bundle"
                    self._report.loaded += 1
                    self._report.seconds += time.perf_counter() - started
                else:
                    self._compiled = self._compile()
                self.seconds = time.perf_counter() - started
            return self._compiled

    def _loaded(self) -> Any:
        if not self._bundle.machine_code or self._stored.code is None:
            return None
        try:
            data = self._code()
            if native.signature(data) != (self._inputs, self._outputs):
                raise ValueError("it takes or returns other arrays than the manifest says")
            return native.load(data, self._device)
        except ValueError as error:  # a CheckpointError is one
            text = "the machine code of %s in %s can't be used, it is compiled from its StableHLO: %s"
            _LOG.warning(text, self._name, self._bundle.path, error)
            return None

    def _compile(self) -> Any:
        function = self._exported()
        self._pending = Pending(
            lambda *arrays: tuple(function(*arrays)),
            self._inputs,
            len(self._outputs),
            program=f"StableHLO {self._stored.stablehlo}",
            bucket={},
            device=self._device,
            report=self._report,
        )
        compiled = self._pending.result()
        self.origin = f"{self._pending.origin}, of the bundle's StableHLO"
        return compiled

    def _exported(self) -> Any:
        from jax import export

        what = f"{self._name}.stablehlo of {self._bundle.path}"
        try:
            exported = export.deserialize(bytearray(self.export()))
        except CheckpointError:
            raise
        except Exception as error:  # whatever a parser raises on what no exporter wrote
            raise CheckpointError(f"{what} can't be read by JAX {jax.__version__}: {error}") from error
        shapes = [native.described(side) for side in (exported.in_avals, exported.out_avals)]
        if shapes != [native.described(self._inputs), native.described(self._outputs)]:
            raise CheckpointError(f"{what} takes or returns other arrays than the manifest says.")
        platform = jax.export.default_export_platform() if self._device.platform == "gpu" else self._device.platform
        if platform not in exported.platforms:
            raise CheckpointError(
                f"{what} is for {', '.join(exported.platforms)}, and the device is {self._device}: an operation of it "
                "is bound to that platform. Save a bundle on this kind of device."
            )
        return exported.call

    def _code(self) -> bytes:
        return bundle_files.read(self._bundle.path / f"{self._name}.xla", self._stored.code)

    def to_bytes(self) -> bytes:
        """The machine code, to be saved again; see aot.Ready."""
        self.result()
        return self._code() if self._pending is None else self._pending.to_bytes()

    def export(self, platforms: Sequence[str] | None = None) -> bytes:
        """The StableHLO as it was saved, whatever the platforms."""
        del platforms
        return bundle_files.read(self._bundle.path / f"{self._name}.stablehlo", self._stored.stablehlo)
