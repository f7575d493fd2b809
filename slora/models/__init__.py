"""Whole models: adapting one, its optimizer groups, its summary.

inject.py           adapting a model in place, and removing the blocks again
injection_record.py the record that `inject` leaves on the model
targets.py          which layers a config selects; adaptable.py: why a module cannot be adapted
modules_to_save.py  what is trained in full; full_precision.py: in fp32
fused_encoders.py   PyTorch's fused encoder path, which would skip the blocks
parameter_groups.py optimizer groups
summary.py          active blocks, parameters, FLOPs
disabled.py         the base model, within a context
lost_layers.py      layers that were adapted and have been replaced, or never trained
exclusive.py        weights are changed by one thread at a time, and completely
features.py         the input of a model's head; logits.py: the logits in what it returns
input_spec.py       the images that a model takes
"""
