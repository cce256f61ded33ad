"""Checks every op on the first NVIDIA GPU against float64, then measures the suite on it, in eight minutes.

Needs torch with CUDA, its Triton, and NumPy; gas_triton need not be installed.

    python -m bench.gpu                    writes bench/results/<gpu>-<date>.json, and tables beside it
    python -m bench.gpu --quick            a look, in 90 seconds
    python -m bench.gpu --only aggregate   one part; the file's other parts stay
"""

import sys

from bench.runner import main

if __name__ == "__main__":
    sys.exit(main("cuda", __doc__))
