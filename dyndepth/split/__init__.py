"""Split computing: layers [0, k) here, layers [k, L) there; only samples that did not leave by then travel."""

from dyndepth.split.frames import Limits
from dyndepth.split.here import SplitEncoder, Traffic
from dyndepth.split.links import GlooLink, Link, TcpLink
from dyndepth.split.payload import WIRES, frame_bytes
from dyndepth.split.there import SplitServer

__all__ = ["WIRES", "GlooLink", "Limits", "Link", "SplitEncoder", "SplitServer", "TcpLink", "Traffic", "frame_bytes"]
