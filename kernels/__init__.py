"""Triton providers, installed as dyndepth.kernels; one file per op, named like the op."""
