"""One list of stages in one folder: trainer, run, stage runner, finetuning, checks.

- ``trainer``: Lightning's Trainer with stages. ``run``: a list of stages in a run folder, and how it resumes.
- ``stage_runner``: applies one stage to a model. ``single_steps``: its forward passes for calibration.
  ``finetuning``, ``training_callbacks``, ``distillation``: its epochs.
- ``run_data``: model and data as the user gave them. ``checks``: what is refused before any work.
- ``companions``: what the folder keeps for exports besides the model.
- ``peak_memory``: memory of a piece of work.
"""
