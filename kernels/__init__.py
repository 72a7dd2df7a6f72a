"""Triton providers, installed as dyndepth.kernels: one file per op, named like the op, and launch.py.

Row counts (`live`, sections) are read on the device; nothing here reads a tensor on the host. Imports from
the folder are relative: its name belongs to another package on PyPI.
"""
