"""One list of stages in one folder: trainer, run, stage runner, finetuning, checks.

- ``trainer``: Lightning's Trainer with stages. ``run``: a list of stages in a run folder, and how it resumes.
- ``stage_runner``: applies one stage to a model. ``single_steps``: its forward passes for calibration.
  ``finetuning``, ``training_callbacks``, ``distillation``: its epochs. ``verification``: what must hold after it.
- ``evaluation``: measures the model. ``early_stop``: ends that in the middle. ``latency``: the time of a forward pass.
- ``forecast``: whether stages can run, and the size after them, before anything runs.
- ``run_data``: model and data as the user gave them. ``checks``: what is refused before any work.
- ``companions``: what the folder keeps besides the model, to use it.
- ``peak_memory``: memory of a piece of work.
"""
