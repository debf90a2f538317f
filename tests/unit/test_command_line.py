"""`pitr` itself: what comes before any command has begun."""

import subprocess
import sys


def test_an_interrupt_while_it_is_loaded_is_told_without_a_traceback() -> None:
    # As if it came when the first library is looked for.
    interrupted = (
        "import sys, signal, os\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from importlib.metadata import entry_points\n"
        "(pitr,) = entry_points(group='console_scripts', name='pitr')\n"
        "pitr.load()()\n"
    )
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
