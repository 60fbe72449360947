"""The accuracy experiment as the original research code spells it: FULL, masked and sparse runs side by side.

    python examples/run_experiments.py --dataset mnist --num-paths 10,50,200

It takes the arguments of ``python -m rwfx.experiments accuracy`` (``--help`` lists them) and does the same:
it shows a progress bar, prints a table and writes it with a CSV and three figures. ``--dataset digits``
needs no download and takes about a minute on two cores; ``mnist`` takes some minutes.
"""

import sys

from rwfx.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(["accuracy", *sys.argv[1:]]))
