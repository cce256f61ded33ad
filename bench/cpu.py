"""Checks every op on this machine's CPU against float64, then measures the suite on it.

python -m bench.cpu                    writes bench/results/<cpu>-<date>.json, and tables beside it
python -m bench.cpu --quick            a look
python -m bench.cpu --only aggregate   one part; the file's other parts stay
python -m bench.cpu --tiny --interpret --only correctness     the GPU's kernels, in Triton's interpreter
"""

import sys

from bench.runner import main

if __name__ == "__main__":
    sys.exit(main("cpu", __doc__))
