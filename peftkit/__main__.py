"""``python -m peftkit``: the command line application, for launchers such as torchrun."""

from peftkit.cli.main import app

if __name__ == "__main__":
    app(prog_name="peftkit")
