"""Exit heads by gradient: a teacher cache of the frozen model, losses against it, and a loop that resumes bit by bit."""

from dyndepth.training.cache import TeacherCache
from dyndepth.training.config import TrainConfig
from dyndepth.training.run import train, tune_maps

__all__ = ["TeacherCache", "TrainConfig", "train", "tune_maps"]
