"""Fine-tuning methods: one file each, behind one interface.

method       the interface
registry     all methods by name; it finds every file here that has a `METHOD`
settings     settings of the methods
training     what they share and what needs torch: layers to adapt, the base class of the trainers

The files here import torch and peft only inside functions, so that the command's help is quick.
"""
