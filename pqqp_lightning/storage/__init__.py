"""Everything on disk that is not weights: atomic files, the run folder, records, the result store.

- ``files``: atomic writes and locks; ``run_folder``: the names of a run's files, and who may write there.
- ``records``: what is recorded of a stage; ``reports``: the types of all records and reports.
- ``result_store``: results by fingerprint, for all searches; ``disk_tensors``: tensors that do not stay in memory.
"""
