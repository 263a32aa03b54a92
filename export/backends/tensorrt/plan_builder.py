"""One ONNX file to one plan, by TensorRT in the process that runs this: see `worker`."""

from pathlib import Path
from typing import Any

import msgspec

from moevlm.export.backends.tensorrt.product import PRODUCTS, configure, load
from moevlm.export.backends.tensorrt.profiles import Profile
from moevlm.export.writing.streamed_file import StreamedFile
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.manifest import FileMetadata
from moevlm.runtime.core.names import PLUGINS
from moevlm.runtime.core.progress import Progress

_PLUGINS = tuple(f"{name}: " for name in PLUGINS)


class Job(msgspec.Struct, frozen=True):
    """product: as in Product.module. onnx, plan: files. plugins: the library, needed for plugin_layers of them.

    flags: names in BuilderFlag. links: a folder of this job's, see `product.load`.
    """

    product: str
    onnx: str
    plan: str
    sms: tuple[int, ...]
    profiles: list[Profile]
    links: str
    plugins: str = ""
    plugin_layers: int = 0
    flags: tuple[str, ...] = ()


class Built(msgspec.Struct, frozen=True):
    """version: of TensorRT. file: the plan."""

    version: str
    file: FileMetadata


def build_plan(job: Job, progress: Progress) -> Built:
    """Parse, check and build. Raises BuildError, in one line that names the node TensorRT refused; OSError."""
    product = PRODUCTS[job.product]
    module = load(product, Path(job.links))
    logger = _logger(module)
    builder = module.Builder(logger)
    if builder is None:
        raise BuildError(f"{product.title} {module.__version__}: {logger.reason()}")
    refused = f"{product.title} {module.__version__} refused {Path(job.onnx).name}"
    if job.plugins and module.get_plugin_registry().load_library(job.plugins) is None:
        raise BuildError(f"{product.title} {module.__version__} cannot load {job.plugins}: {logger.reason()}")
    # Required by TensorRT 10; TensorRT 11 and TensorRT-RTX know no other networks.
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    parser.set_flag(module.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(job.onnx):
        raise BuildError(f"{refused}: {logger.of_plugins() or _parser_error(parser) or logger.reason()}")
    layers = [network.get_layer(i).type for i in range(network.num_layers)]
    found = layers.count(module.LayerType.PLUGIN_V3)
    if found != job.plugin_layers:
        raise BuildError(f"{refused}: it made {found} plugin layers of {job.plugin_layers} nodes")
    config = builder.create_builder_config()
    configure(module, product, config, job.sms)
    config.clear_flag(module.BuilderFlag.TF32)  # set by default; what stays float32 in the graph is float32
    for flag in job.flags:
        config.set_flag(getattr(module.BuilderFlag, flag))
    for profile in job.profiles:
        ranges = builder.create_optimization_profile()
        for name, shapes in profile.items():
            try:
                ranges.set_shape(name, *shapes)
            except (ValueError, RuntimeError) as error:
                raise BuildError(f"{refused}: {name} up to {shapes[2]}: {_one_line(str(error))}") from error
        if config.add_optimization_profile(ranges) < 0:
            raise BuildError(f"{refused}: {logger.reason()}")
    config.progress_monitor = monitor = _monitor(module, progress)
    del parser
    file = StreamedFile(Path(job.plan))
    try:
        _write(module, builder, network, config, file, f"{refused}: ", logger)
        monitor.last()
        return Built(module.__version__, file.close())
    finally:
        file.abort()


def _write(module: Any, builder: Any, network: Any, config: Any, file: StreamedFile, refused: str, logger: Any) -> None:
    """The plan straight to its file, which takes two thirds of the memory."""
    writer = _writer(module, file)
    done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not done:
        raise BuildError(refused + logger.reason())


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return ""
    error = parser.get_error(0)
    node = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    return node + _one_line(error.desc())


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _logger(module: Any) -> Any:
    class Logger(module.ILogger):
        """Keeps errors."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(_one_line(msg))

        def reason(self) -> str:
            """The first error: what follows are its consequences."""
            return self.errors[0] if self.errors else "it gave no reason"

        def of_plugins(self) -> str:
            """The first error of a plugin, of which TensorRT itself says no more than that there was one."""
            return next((error for error in self.errors if error.startswith(_PLUGINS)), "")

    return Logger()


def _writer(module: Any, file: StreamedFile) -> Any:
    class Writer(module.IStreamWriter):
        """Exceptions must not leave it: TensorRT called it."""

        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(bytes(data))
            except OSError as error:
                self.error = error
                return 0
            return len(data)

    return Writer()


def _monitor(module: Any, progress: Progress) -> Any:
    class Monitor(module.IProgressMonitor):
        """The steps of the outermost phase."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.outer, self.steps = "", 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.outer, self.steps = phase_name, num_steps
                progress(0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outer:
                progress(step, self.steps)
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

        def last(self) -> None:
            progress(self.steps or 1, self.steps or 1)

    return Monitor()
