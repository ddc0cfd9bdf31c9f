"""``python -m weightd.daemon.keeper COMMAND...``: the keeper's process."""

import sys

from weightd.daemon.keeper.supervisor import main

sys.exit(main())
