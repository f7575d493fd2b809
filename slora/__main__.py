"""`python -m slora`: the command line, as torchrun and accelerate launch start it."""

from slora.cli.app import main

main()
