"""Size and time of exported image networks in ONNX Runtime and OpenVINO, one thread.

python benchmarks/export_vision.py NAME=model.onnx ... [--batch 1] [--runs 200]

The files are timed in turns. Printed are the medians of a call's latency and of the processor time that the process
spent in it: with other work on the machine, only the second compares.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import openvino


def onnx_runtime(file: str, batch: int) -> Callable[[], object]:
    """A call of the model in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    image = np.random.default_rng(0).standard_normal((batch, *entry.shape[1:])).astype(np.float32)
    return lambda: session.run(None, {entry.name: image})


def in_openvino(file: str, batch: int) -> Callable[[], object]:
    """A call of the model in OpenVINO."""
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"})
    shape = [batch, *[size.get_length() for size in list(compiled.input(0).partial_shape)[1:]]]
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return lambda: compiled([image])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    models = dict(item.split("=", 1) for item in options.models)
    calls = {}
    for name, file in models.items():
        calls[name, "ONNX Runtime"] = onnx_runtime(file, options.batch)
        calls[name, "OpenVINO"] = in_openvino(file, options.batch)
    elapsed_s: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    processor_s: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for run in range(options.runs + 5):
        for key, call in calls.items():
            start = time.perf_counter()
            processor = time.process_time()
            call()
            if run >= 5:  # the first ones allocate
                elapsed_s[key].append(time.perf_counter() - start)
                processor_s[key].append(time.process_time() - processor)
    print(f"batch {options.batch}, one thread, median of {options.runs}; {os.cpu_count()} cores")
    print(f"onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__.split('-')[0]}")
    for name, file in models.items():
        times = []
        for program in ("ONNX Runtime", "OpenVINO"):
            numbers = [median(seconds[name, program]) * 1e3 for seconds in (elapsed_s, processor_s)]
            times.append(f"{program} {numbers[0]:.2f} ms (processor {numbers[1]:.2f})")
        print(f"{name:<24} {Path(file).stat().st_size / 1e6:7.3f} MB   {'   '.join(times)}")


if __name__ == "__main__":
    main()
