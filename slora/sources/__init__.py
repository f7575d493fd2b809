"""Models and data sets by name, and the batches of a run.

registry.py                  models, CLIPs and data sets that other packages add, such as those of `slora.demo`
model_names.py, model_args.py, models.py   `timm/...`, `open_clip/...` and registered models
data_names.py, data.py, folders.py, labels.py   data sets of torchvision, image folders, registered data sets
eval_sets.py, tar_shards.py, captions.py     labelled and captioned images to evaluate on
imagenet.py, suite_names.py, suites.py       ImageNet's classes, its test sets and their shifted relatives
batches.py                   the batches of an epoch, in an order that depends on the seed alone
optional.py                  imports of timm, open_clip and torchvision
"""
