"""A run: model + task + method -> `transformers.Trainer` -> run folder.

settings          what can be set, and its checks
parsing           settings from the command line and from YAML
aliases           other names of settings: those of transformers and PEFT, and short ones
completers        what a shell offers as values
presets           settings that come with the package
inputs            task and model, checked before weights are loaded
calibration       calibrates a model before it is quantized
train             the run itself
trainer           creates the trainer
sampler           batches of rows of similar length
console           what a run prints
progress_bar      the bar of all commands
doubts            signs that a model learns nothing useful
folder            the folder of a run
whole_files       writes a file or folder completely or not at all
checkpoints       which checkpoints are complete
card, plots       model card and plots
markdown          text from files in Markdown
hub               upload to the Hugging Face Hub
finished_run      evaluate, predict and merge
adapter_files     the files of a saved adapter, checked before they are loaded
search            learning rate and batch size by Optuna
machine           versions, devices, speed of bfloat16
phase             time and memory of a phase
processes         several processes of one run
process_identity  which process holds a lock
interrupts        Ctrl-C that a library swallows
exit_codes        how the command ends
"""
