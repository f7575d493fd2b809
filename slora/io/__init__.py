"""Files and values, without torch: written whole or not at all, read within bounds.

atomic.py      files that are either the old one or the new one
bounded.py     files that may have come from elsewhere
yaml_files.py  YAML
plain.py       numbers, names and collections of any library as Python's own
"""
