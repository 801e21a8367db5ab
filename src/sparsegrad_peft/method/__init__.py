"""The method in plain PyTorch, without transformers and peft. Read `reference.py` first, then in this order.

    gradients    1  a few steps of backpropagation -> the gradient of each target layer
    gram            gradients -> Gram matrices, streamed (the paper)
    pairs           gradients -> products of different gradients, streamed (the adapter's default)
    projected       the same for large models, with less memory
    hosvd        2  Gram matrices -> orthogonal factors and spectra
    common_energy   the same for the sums of pairs and projected
    statistics      ... -> the group's basis, and the scales of the entries
    basis           Basis(U, V), shared by a group of layers
    selection    3  gradient in the basis -> its k largest entries
    function     4  forward and backward of the layer
    linear          SparseGradLinear: from_linear, forward, to_linear
    optim        5  SparseAdam on the selected entries, AdamW on the rest

Around these:

    calibrate    1 and 2 for all groups of a model: calibrate(model, batches).bases()
    surgery      replace a model's layers and put them back; the optimizer's parameter groups
    positions    choose fixed entries for a packed core
    refresh      new bases, or new positions, during training
    data_free    bases without calibration
    literal      the layer as published
    experts      fused experts, seen as one matrix
    reference    all of it again: dense, slow, in the order of the paper's equations

Settings and sizes:

    config       how calibration takes its gradients
    groups       which layers share a basis
    sizes        rows of a basis
    sum_sizes    memory of calibration's sums
    costs        multiply-adds

Several processes:

    processes    wait, average, broadcast
    averaging    average gradients during backward
    sharded      select from parameters that are spread over processes
    ddp          keep the bases out of DDP's broadcasts

Tools:

    sides            directions, selected features, or the identity
    products         products of several matrices in the cheapest order
    live_rows        tokens that have a gradient
    plain            nn.Linear and Conv1D in one layout
    precision        data types
    restored_state   leave a model as it was
    sparse_adam      the update rule of SparseAdam
"""
