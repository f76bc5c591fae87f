"""The one base model in memory: loading, roles, sampling and scoring."""

import logging

# bitsandbytes complains at import of a CPU kernel that is not installed and that this package switches off anyway.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
