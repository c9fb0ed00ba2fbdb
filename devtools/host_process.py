"""Runs ComfyUI's main.py in this process, which ends as soon as the process that started it does.

The starter holds the other end of stdin. However it ends, the system closes that pipe: no orphan, on any platform.
Usage: python host_process.py COMFYUI_FOLDER [ComfyUI options]
"""

import os
import runpy
import sys
import threading
from pathlib import Path


def _end_with_starter() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


def main() -> None:
    root = Path(sys.argv[1])
    threading.Thread(target=_end_with_starter, daemon=True).start()
    sys.argv = [str(root / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(root)
    os.chdir(root)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
