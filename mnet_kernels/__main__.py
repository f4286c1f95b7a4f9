"""``python -m mnet_kernels`` is the command ``mnet-kernels``."""

import sys

from mnet_kernels.cli import main

sys.exit(main())
