"""Models and data sets by name.

model_names.py, model_args.py, models.py   `timm/...`, `open_clip/...`, `demo/...`
data_names.py, data.py, folders.py         data sets of torchvision, image folders
batches.py                                 which images form which step
"""
