"""The `slora` command: one file per subcommand, each of which calls one function of the library and prints the result.

app.py        `main`, and the options before the subcommand; errors.py: how errors are shown
demo.py  finetune.py  evaluate.py  merge.py  compress.py  decompress.py  inspect.py  report.py  doctor.py
flags of finetune     come from `slora.runs.flags`
checkpoint_option.py  the option --checkpoint of evaluate, merge and inspect
"""

from slora.cli.app import main

__all__ = ["main"]
