"""The words everybody uses: edges, activations, memory formats, fresh tensors over old storage, errors. Imports nothing of ours."""
