"""Compression algorithms in pure torch: functions of tensors and plain numbers that return new tensors.

Shapes: O output rows, I input columns, G groups of columns, T tokens (rows of calibration input).

- Unstructured pruning: ``magnitude``, ``wanda``, ``sparsegpt``, ``gradual``; ``selection`` picks the entries.
- Structured pruning: ``sleb`` (blocks), ``channels``.
- Quantization: ``rtn``, ``gptq``, ``lsq`` (learned steps), ``activation``; ``grid`` and ``codebook`` hold the levels.
- Shared by SparseGPT and GPTQ: ``hessian``, ``column_sweep`` and its GPU kernel ``column_sweep_triton``.
- Rotation: ``quarot``, ``hadamard``. Low rank: ``lora``, ``basis_sharing``.
- Budgets and analysis: ``allocation``, ``interference``, ``rank_statistics``. Storage: ``packing``.
"""
