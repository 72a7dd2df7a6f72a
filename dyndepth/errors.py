"""Every exception dyndepth raises on purpose. Messages name the op or call, the argument, what is wanted and what came."""


class ArgumentError(ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class BackendError(RuntimeError):
    """A forced provider cannot run, or no provider can."""


class PagesFullError(RuntimeError):
    """The paged KV cache has no free page left."""


class UnsupportedModelError(ValueError):
    """The model's type has no family spec, or uses a feature that its spec does not cover."""


class ExitsError(ValueError):
    """An exits file is damaged, has an unknown version, or was made for another model; or exits lack what a call needs."""


class NotEnoughDataError(ValueError):
    """A fit was asked for with fewer tokens than its estimates need."""


class CacheError(ValueError):
    """A teacher cache is damaged, unfinished, of something else, or does not fit the disk."""


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not finite, or a checkpoint of another run."""


class SplitError(RuntimeError):
    """The other side of a split encoder sent what cannot be used, said that something went wrong there, or was silent."""
