"""Proofs on the spot: a kernel that was never seen to be right on this device answers no call of a training step.

A call's *kind* is what kernels are specialised for: sizes, strides, dtypes, which arguments there are (:mod:`.kinds`). Calls of a kind
that is not proved are answered by the reference, and the kind is proved meanwhile in a process of its own (:mod:`.prover`,
:mod:`.worker`): on random numbers (:mod:`.draw`) against float64, run to run identical, memory poisoned, nothing written beside its
outputs (:mod:`.check`). What was found is kept on disk (:mod:`.ledger`). Nothing here knows a device.
"""
