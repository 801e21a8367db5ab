"""Fine-tuning methods, behind one interface.

method       the interface
registry     all methods by name; it finds every file here that has a `METHOD`
settings     settings of the methods
ranges       values that a setting may have
peft_file    any method of PEFT, from its adapter_config.json
training     what they share and what needs torch: layers to adapt, the base class of the trainers

Each other file is one method.

The files here import torch and peft only inside functions, so that the command's help is quick.
"""
