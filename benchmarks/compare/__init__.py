"""The comparison: dyndepth beside what else makes tokens on this machine, in one run (`python -m compare.run`)."""
