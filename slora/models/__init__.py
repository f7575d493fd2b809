"""Whole models: adapting one, its optimizer groups, its summary.

inject.py           adapting a model in place, and taking the adapter off
targets.py          which layers a config means; adaptable.py: why a module cannot be adapted
modules_to_save.py  what is trained in full; full_precision.py: in fp32
parameter_groups.py optimizer groups
summary.py          active blocks, parameters, FLOPs
disabled.py         the base model, for a while
lost_layers.py      adapted layers that are no part of the model any more
features.py         what the head of a model sees
"""
