"""All exceptions that are meant for the user; the message is one line that says what is wrong, and what to do.

MlvgmError                  the base; `mlvgm` prints such an error in a line and ends with exit code 2
    FieldError              a field of a YAML or JSON file is unknown, missing, or has a wrong value
    RecipeError             no such recipe, or a field of it is wrong
    CheckpointError         a checkpoint cannot be used
    NpzError                an .npz file is damaged, or lacks what is needed
    ModelError              no model can be made of a family, architecture or callable
    TrainingError           a model cannot be trained with these settings or on these images
    ClassifierError         a pipeline cannot use a classifier
    TraceError              a stage cannot be traced
    ParityError             an exported stage is further from its reference than its precision allows
    ExportError             the models do not fit the recipe, or the bundle cannot be written to its folder
    SingleGraphError        the stages of a bundle do not make one graph, or it differs from the pipeline
    BuildError              an engine cannot be built
    ArchiveError            an archive cannot be built
    BundleError             a bundle is missing, damaged, altered, or of another version
    RuntimeMissing          a runtime is unknown, not installed, or finds no device
    EngineError             an engine file cannot be loaded or run
        NonFiniteError      a stage gave infinities or NaN
    InputError              an argument of a `Pipeline` has the wrong shape, type or range
    ImageError              an image is refused: damaged, too large, or in another format
        DamagedError        the bytes of an image do not follow its format
    RequestError            a request is malformed, or has a wrong option
    ServerError             a server cannot be reached, or answered with an error
    AttackError             an attack cannot be made
    PhotographError         labelled images cannot be read, or their classes are not the bundle's
    ComparatorError         a comparator cannot be trained or read
    TuningError             a search for interpolation weights cannot run
    VerificationError       a bundle and the reference cannot be compared
    TrtexecError            trtexec is missing or fails
    CliError                options of a command contradict each other, or name something that does not exist
"""


class MlvgmError(Exception):
    """An error that the user can correct; the message says what is wrong, and what to do."""


class InputError(MlvgmError, ValueError):
    """An argument has the wrong shape, type or range; the message says what it should be."""
