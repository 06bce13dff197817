"""``python -m vllm_steer.cli`` is ``vllm-steer``."""

import sys

from vllm_steer.cli import main

if __name__ == "__main__":
    sys.exit(main())
