"""Every exception that is written for the user: one line with what is wrong, and what to do.

MlvgmError                  the base; `mlvgm` prints such an error in a line and ends with exit code 2
    FieldError              a YAML or JSON file: a field is unknown, missing, or holds what it must not
    RecipeError             no such recipe, or a field of it is wrong
    CheckpointError         a checkpoint cannot be used
    ModelError              a family, an architecture or a callable that gives no model
    TrainingError           a model cannot be trained with these settings or on these images
    ClassifierError         a classifier is not what a pipeline can use
    TraceError              a stage cannot be traced to a graph
    ParityError             an exported stage is further from PyTorch than its precision allows
    ExportError             the models do not fit the recipe, or the bundle has no place
    BuildError              an engine cannot be built
    ArchiveError            no archive can be made of a bundle
    BundleError             a bundle is missing, damaged, altered, or of another version
    RuntimeMissing          a runtime is unknown, not installed, or finds no device
    EngineError             an engine file cannot be loaded or run
        NonFiniteError      a stage gave infinities or NaN
    InputError              an argument of a `Pipeline` has the wrong shape, type or range
    ImageError              an image is refused: damaged, too large, or of no format that is read
        DamagedError        the bytes of an image do not follow its format
    RequestError            a request that cannot be answered as it stands
    ServerError             a server cannot be reached, or answered with an error
    AttackError             an attack cannot be made
    VerificationError       a bundle and the reference cannot be compared
    TrtexecError            trtexec is missing or fails
    CliError                options of a command that do not go together, or name what is not there
"""


class MlvgmError(Exception):
    """Something that the user can mend; the message says what, and how."""


class InputError(MlvgmError, ValueError):
    """An argument that has the wrong shape, type or range; the message says what it should be."""
