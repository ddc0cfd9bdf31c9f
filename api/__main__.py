"""The daemon process, ``python -m weightd.api``. Settings come from ``WEIGHTD_*`` variables."""

import sys

from weightd.api.server import serve
from weightd.daemon.settings import Settings

try:
    sys.exit(serve(Settings()))
except (OSError, ValueError) as error:
    sys.exit(f"weightd: {error}")
