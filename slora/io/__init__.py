"""Files and values, without torch: written completely or not at all, read with limits.

atomic.py      writing files: after a kill, a file is the old one or the new one
bounded.py     reading files that may come from elsewhere, and checks of JSON values
yaml_files.py  reading YAML
plain.py       scalars and collections of other libraries as Python's own
"""
