"""The errors a user can meet: what was checked, what was got, what was wanted, the next step."""


class RefitError(Exception):
    """Base of every error this project raises on purpose."""


class UserError(RefitError, ValueError):
    """Something a user can mend: a recipe, a checkpoint, a dataset, a target."""


class RecipeError(UserError):
    """A recipe that is not valid, or does not fit the parent it names."""


class CheckpointError(UserError):
    """A checkpoint that is refused: wrong family, unsafe files, missing or broken tensors."""


class HubError(UserError):
    """A model hub that cannot be reached or refuses, or a repository that is not as private as was asked."""


class DataError(UserError):
    """A source, corpus or mixture that cannot give what the recipe asks of it."""


class InfeasibleError(UserError):
    """A target that no choice of blocks can meet; the message names the binding limits."""


class ArtifactError(RefitError):
    """An artifact that is missing, incomplete, locked or not what its manifest says."""


class MissingInputError(ArtifactError, UserError):
    """An upstream artifact that has not been materialized for this recipe."""


class StageError(RefitError):
    """A stage that ended without a result."""


class DivergedError(StageError):
    """A training whose loss or gradients are no longer finite."""
