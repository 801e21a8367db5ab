"""What a model consists of and what SparseGrad would do to it, from its config alone: `sparsegrad inspect`.

    config.json ──► the model's modules on the meta device ──► ModelParts, GroupRow, MethodBytes ──► tables

built    a model's modules without weights, and which of its layers are meant
parts    parameters by part: embeddings, attention, MLP, ...
inspect  groups of layers, and bytes under each method
tables   for the terminal

No weight is downloaded or allocated, so a model of any size is looked at in a second. Every number is computed, none is
measured; activations are left out, because they depend on the batch.
"""
