"""The method in plain PyTorch, without transformers and peft. Read `reference.py` first, then in this order.

    gradients    1  a few steps of backpropagation -> the gradient of each target layer
    gram            gradients -> Gram matrices, streamed (the paper)
    mean            gradients -> their sum, streamed (the adapter's default)
    hosvd        2  either sums -> orthogonal factors and spectra
    statistics      ... -> the group's basis
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
    literal      the layer as published
    experts      fused experts, seen as one matrix
    reference    all of it again: dense, slow, in the order of the paper's equations

Helpers: config (calibration's settings), groups (which layers share a basis), sizes (rows of a basis), costs
(multiply-adds), products (chains of matrices), live_rows (tokens with a gradient), plain (nn.Linear and Conv1D),
precision (data types), processes (several processes), restored_state, sparse_adam (the
update rule).
"""
