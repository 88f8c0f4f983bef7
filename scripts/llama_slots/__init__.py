"""The commands of `llama-slots`. In a checkout, scripts/serve.py, chat.py and weights.py run the same code."""

from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

# Refuses another distribution's `api`. `llama` lies beside this package, or beside scripts/ in a checkout.
_FOLDERS = [folder / "llama" for folder in Path(__file__).resolve().parents[1:3]]
_CHECK = next(path for folder in _FOLDERS if (path := folder / "_floor.py").is_file())
if find_spec("api") is not None:  # a command says in one line that it is missing
    run_path(str(_CHECK))["check_floor"]("api")
