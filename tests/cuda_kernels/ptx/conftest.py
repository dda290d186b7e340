"""Make the probes and the small attention kernel importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
