"""Figures of the method at work on a model and a task: `sparsegrad figures`.

    settings    what the user sets
    setup       the model, its MLP layers by block, and batches of the task
    training    the two short training runs that are measured
    collect     takes all measurements
    folder      writes and reads the results: figures.json, figures.npz, an SVG for each figure, index.md
    drawing     what all figures share
    cells       large matrices as small images
    data_flow.svg  figure 1 with the default settings, which documents show; data_flow.py draws the run's own

Each other file is one figure. Its `draw(data)` returns a `Drawing`; the measurements that belong to it alone are in the
same file.
"""
