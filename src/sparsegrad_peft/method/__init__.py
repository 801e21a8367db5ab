"""The method, in plain PyTorch: no transformers, no peft.

    calibrate    gradients of a few steps -> Gram matrices     (gradients.py streams them, groups.py says whose,
                                                               untouched.py puts the model back)
    hosvd        Gram matrices -> orthogonal factors, spectra
    basis        Basis(U, V), shared by a group of layers
    selection    gradient in the basis -> its k largest entries
    function     forward and backward of the layer             (products.py orders chains of matrices)
    linear       SparseGradLinear: from_linear, to_linear      (literal.py: the layer as published)
    optim        SparseAdam on the selected entries, AdamW on the rest
    positions    fixed entries for a packed core
    refresh      new bases, or new positions, during training
    surgery      the layers of a model, replaced and put back
    reference    all of it again: dense, slow, in the order of the paper's equations

Read `reference.py` first, then down the list.
"""
