"""`python -m tests.megatron_cuda FOLDER` runs the job."""

import sys
from pathlib import Path

from tests.megatron_cuda.job import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
