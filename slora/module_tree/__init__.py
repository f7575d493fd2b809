"""The modules of any PyTorch model, adapted or not: their names, what wraps them, where they are referred to.

names.py      what an entry of a list of names means
wrappers.py   names without those of DDP, torch.compile, ...
sharded.py    parameters that FSDP2 has sharded
places.py     putting modules in the place of others
modes.py      training or evaluation, for a while
exclusive.py  weights are changed by one thread at a time, and completely
"""
