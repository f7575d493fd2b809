"""Adapters on disk, in PEFT's format.

adapter.py  saving and loading
files.py    the files of an adapter, and `selective.json`
peft.py     one LoRA pair for each layer, and `adapter_config.json`, as PEFT reads them
tensors.py  the tensors, checked
fit.py      whether an adapter fits a model
"""
