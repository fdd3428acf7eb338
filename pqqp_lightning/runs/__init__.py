"""One list of stages in one folder: trainer, run, stage runner, finetuning, checks."""
