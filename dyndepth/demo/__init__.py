"""The demo: a real model, every token leaving at its own depth."""

from dyndepth.demo.weights import chat, load, load_exits, load_model

__all__ = ["chat", "load", "load_exits", "load_model"]
