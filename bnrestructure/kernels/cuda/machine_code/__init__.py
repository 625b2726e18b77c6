"""Reads what ptxas made of the kernels: disassembly, registers, and the faults that can be seen in it. Needs neither a GPU nor Triton."""
