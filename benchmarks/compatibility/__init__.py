"""The census: every architecture is adapted, trained for a step, merged, saved and loaded, and compared with itself.

architectures.py        which there are, and timm's and torchvision's
clip_models.py          open_clip's
transformers_models.py  transformers'
subject.py              what is examined
examination.py          what is asked of it
census.py               a process for each, and the result file
"""
