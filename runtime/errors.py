"""Every error that a user can cause, as one small tree. The CLI prints the message as one line and exits with 2."""


class MoevlmError(Exception):
    """Base of all errors raised on purpose: the message names the field or file, its value, and what is allowed."""


class CheckpointError(MoevlmError):
    """The checkpoint directory is incomplete, damaged, or not what its config says."""


class UnsupportedModelError(MoevlmError):
    """The checkpoint asks for an architecture or a field value that the exporter cannot reproduce."""


class ExportError(MoevlmError):
    """Tracing or writing the canonical graphs failed."""


class BuildError(MoevlmError):
    """A target could not be built from the canonical graphs."""


class BundleError(MoevlmError):
    """A bundle is missing, damaged, or lacks what was asked for."""


class EngineError(MoevlmError):
    """An inference engine refused its artifact or its inputs."""


class RequestError(MoevlmError):
    """A prompt, image or option of one generation request is not acceptable."""


class Cancelled(MoevlmError):
    """The caller cancelled the request while it ran."""
