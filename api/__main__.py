"""The daemon process, ``python -m weightd.api``. Settings come from ``WEIGHTD_*`` variables."""

import sys

from weightd.api.server import serve
from weightd.daemon.settings import Settings
from weightd.daemon.sockets import RuntimeDirInUse

try:
    sys.exit(serve(Settings()))
except (RuntimeDirInUse, OSError, ValueError) as error:
    sys.exit(f"weightd: {error}")
