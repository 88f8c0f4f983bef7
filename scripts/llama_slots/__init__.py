"""The commands of `llama-slots`. In a checkout, scripts/serve.py, chat.py and weights.py run the same code."""

from pathlib import Path
from runpy import run_path

# Refuses another distribution's `api`. `llama` lies beside this package, or beside scripts/ in a checkout.
_FOLDERS = [folder / "llama" for folder in Path(__file__).resolve().parents[1:3]]
_CHECK = next(path for folder in _FOLDERS if (path := folder / "_floor.py").is_file())
run_path(str(_CHECK))["check_floor"]("api")
