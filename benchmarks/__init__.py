"""Benchmarks: what the library costs beside bare torch, as ratios measured in one run on one thread.

`python -m benchmarks [NAME…]` runs them; docs/benchmarks.md says what each measures and what is not promised.
"""

import os

# Before anything loads a library that starts its threads.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
