"""Where the time of a decode step goes: `profile` measures, `tables` shows, `trace.write` keeps every span."""

from dyndepth.profiling.run import Profile, profile
from dyndepth.profiling.timers import Recorder, Target, timing

__all__ = ["Profile", "Recorder", "Target", "profile", "timing"]
