"""The modules of any PyTorch model, adapted or not: their names, what wraps them, where they are referred to.

names.py      matching of names, and suggestions for a name that matches nothing
wrappers.py   names without the wrappers of DDP, torch.compile, ...
sharded.py    parameters that FSDP2 has sharded
swap.py       replacing modules wherever a model refers to them
modes.py      a context in evaluation mode
"""
