"""Runs compiled kernels without a GPU: the very machine code, instruction by instruction, on NumPy arrays of threads.

What is emulated is what Triton's kernels use of sm_80 to sm_90. A block's threads go in step as far as branches allow, and whatever can
happen at more than one time (copies to shared memory, asynchronous products) is watched: who reads or overwrites it too early is told
(:class:`Fault`). So a kernel's numbers, its accesses and its barriers can be checked, and its instructions counted, before any device
runs it.
"""

from emulator.state import Fault

__all__ = ["Fault"]
