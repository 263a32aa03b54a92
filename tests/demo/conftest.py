import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `demo` is a folder, not an installed package
