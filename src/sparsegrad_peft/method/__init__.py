"""The method, in plain PyTorch: no transformers, no peft. Read from `reference.py` to `optim.py`.

calibrate  gradients of a few steps -> Gram matrices        (gradients.py streams them, groups.py says whose)
hosvd      Gram matrices -> orthogonal factors, spectra
basis      Basis(U, V), shared by a group of layers
selection  gradient in the basis -> its k largest entries
function, linear                  the layer, fast           (literal.py: the layer as published)
optim      SparseAdam on the selected entries, AdamW on the rest
refresh    new bases during training
surgery    the layers of a model, replaced and put back
reference  all of it again: dense, slow, in the order of the paper's equations
"""
