"""A run: model + task + method -> `transformers.Trainer` -> a folder with the adapter and what is to be known of it.

arguments    what can be set, checked before any work
presets      settings that come with the package
kinds        in which a run of one kind of task differs from one of another
methods      a method's name -> adapted model and what the trainer has to know
train        the run itself
meter        time and peak memory of a phase
environment  commit, versions, machine
folder       the files of a run: written whole or not at all
picture      loss and score as an image
use          a finished run: evaluate, predict, merge
"""
