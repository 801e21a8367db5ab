"""What is learnt: tasks, their rows, labels and metrics, and what differs between kinds of model.

    settings       DataArguments: which rows
    registry       task name -> loader; the one list of tasks
    load           load_task
    task           Task: splits, columns, labels, metrics
    hold_out       a part of the rows, kept for evaluation

    glue           the nine GLUE tasks
    quora          pairs of questions that ask the same or not; paraphrases
    acceptability  sentences that come with the package
    files          your own texts with labels, texts, and conversations
    oasst1         OpenAssistant conversations
    images         digits, and image folders
    unrelated      texts that a run does not train on

    read           CSV, TSV and JSON files -> rows
    parse_files    YAML and JSON files
    checksums      SHA-256 of files
    labels         label columns -> class numbers
    conversations  chat formats -> messages
    metrics        scores
    model_folder   names and folders of pretrained models
    pretrained     configs and tokenizers; a model without its weights
    gguf_models    GGUF files -> transformers folders
    generation     text from a causal language model
    library_logs   hide the logs of transformers and datasets
    kinds/         text, language, images: features, batches, scores, predictions

Nothing here depends on the training method.
"""
