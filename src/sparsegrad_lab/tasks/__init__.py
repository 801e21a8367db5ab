"""What is learnt: tasks, their rows, labels and metrics, and what differs between kinds of model.

    settings       DataArguments: which rows
    registry       task name -> loader; the one list of tasks
    load           load_task
    task           Task: splits, columns, labels, metrics

    glue           the nine GLUE tasks
    acceptability  sentences that come with the package
    files          your own texts with labels, texts, and conversations
    oasst1         OpenAssistant conversations
    images         digits, and image folders

    read           CSV, TSV and JSON files -> rows
    labels         label columns -> class numbers
    conversations  chat formats -> messages
    metrics        scores
    model_folder   names and folders of pretrained models
    pretrained     configs and tokenizers; a model without its weights
    library_logs   hide the logs of transformers and datasets
    kinds/         text, language, images: features, batches, scores, predictions

Nothing here depends on the training method.
"""
