"""Parameters of a model, the layers that SparseGrad adapts, and memory by method: `sparsegrad inspect`.

    config.json ──► the model on the meta device ──► ModelParts, GroupRow, MethodBytes ──► tables or JSON

    model           builds the model without weights and finds the layers to adapt
    shipped_models  configs that come with the package
    parts           parameters by part: embeddings, attention, MLP, ...
    groups          layers to adapt, with sizes, trained entries and bytes
    memory          bytes of each method
    activations     bytes that a training step saves for backward, if the size of the batch is given
    inspect         puts these together
    tables          prints them

Nothing is downloaded but the config, and no weight is allocated. All numbers are computed from shapes.
"""
