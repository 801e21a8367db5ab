"""What is learnt: rows of text with a label, from GLUE, from your files, or from the grammar in this package; texts and
conversations to go on with; or images with a class.

    load           a task by its name
task           Task: the data sets of its splits, its columns, its labels, its metrics
read           text files -> rows, checked
glue           the nine GLUE tasks, from a folder or from the hub
files          any CSV, TSV or JSON file with named columns
oasst1         OpenAssistant's conversations
lexicon        words for
acceptability  sentences of a small English grammar, acceptable or not
metrics        official metrics
images         digits, and images in folders
features       rows -> token ids
language       texts, answers and conversations -> token ids, and which of them are learnt

Nothing here knows the method: these are plain tasks.
"""
