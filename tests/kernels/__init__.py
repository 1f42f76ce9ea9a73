"""The kernels, each against its reference, and as machine code for GPUs that are not there."""

COMPILED = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
"""Targets that differ in their machine code; sm_86 has that of sm_80 and the memory of sm_89."""
