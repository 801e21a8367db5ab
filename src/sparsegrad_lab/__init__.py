"""The laboratory: what the `sparsegrad` command runs. It imports `sparsegrad_peft`, never the other way round.

tasks       what is learnt: rows, features, metrics
methods     one file a method, behind one interface
run         model + task + method -> Trainer -> run folder
chat        answers of a fine-tuned language model, and their grades
study       grids of runs, their results, tables and the report page
figures     pictures of what the method sees in a model
bench       time and memory of a training step
inspection  a model's parts and sizes before any training
cli         one file a subcommand
"""
