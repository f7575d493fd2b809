"""Adapters on disk: saving and loading, in PEFT's format.

adapter.py  `save_adapter` and `load_adapter`
files.py    the files of an adapter directory; `selective.json` read and checked
tensors.py  `adapter_model.safetensors` read, checked and divided among layers and modules
fit.py      whether an adapter fits a model
peft.py     each layer as one LoRA pair, and `adapter_config.json`, for PEFT
"""
