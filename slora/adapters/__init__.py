"""Adapters on disk: in PEFT's format, and `selective.json` with the gates and the base model's fingerprint.

save_load.py       `save_adapter` and `load_adapter`
selective_json.py  the names of the files; `selective.json` read and checked
tensors.py         `adapter_model.safetensors` read, checked and divided among layers and modules
fit.py             whether an adapter fits a model
peft.py            each layer as one LoRA pair, and `adapter_config.json`, for PEFT
compress.py        an adapter as a small file, and back; ternary.py: LoRA pairs as signs, and their packing
"""
