"""Tables, statistics, verdicts, figures and the report; needs no torch.

Imports point one way, and none of the two packages in the middle imports the other:

    report, notebook -> figures | verdicts -> display -> style, words -> tables -> statistics, names

``tables`` are made once and read by all others; a figure or a verdict that changes makes none anew.

Whatever draws is imported from here, so that this comes before matplotlib reads its settings.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def _writable(folder: Path) -> bool:
    """Whether the folder can be written to, or made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _own_matplotlib() -> None:
    """Keep matplotlib, here and in the kernels of notebooks, off what the user has set for it.

    A foreign ``matplotlibrc`` or backend would change every picture, or fail to load. Where it may
    not write, it would complain in every log; it then gets a folder that goes away.
    """
    os.environ.update(MATPLOTLIBRC=os.devnull, MPLBACKEND="Agg")
    home = Path(os.path.expanduser("~"))  # Path.home() fails where there is none
    config, cache = (
        Path(os.environ.get(name) or home / usual, "matplotlib")
        for name, usual in (("XDG_CONFIG_HOME", ".config"), ("XDG_CACHE_HOME", ".cache"))
    )
    own = os.environ.get("MPLCONFIGDIR")
    if not all(map(_writable, [Path(own)] if own else [config, cache])):
        os.environ["MPLCONFIGDIR"] = folder = tempfile.mkdtemp(prefix="matplotlib-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


_own_matplotlib()
