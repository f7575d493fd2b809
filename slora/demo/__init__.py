"""`slora demo`: adapt a small vision transformer that reads rendered letters to handwritten digits, on a CPU.

Nothing is downloaded: the letters are rendered from fonts inside matplotlib, the digits come with scikit-learn,
and the pretrained model is a file in this folder. Read in this order:

    letters.py    the source data: 52 rendered letters
    digits.py     the target data: handwritten digits in the same format; shifts.py: the same digits, changed
    model.py      the model and its pretrained weights, `letters_vit.safetensors`; pretrain.py: trains them
    methods.py    the compared methods, and one training run of each
    judge.py      the table of results, and whether the aims are met
    captions.py   captions of the letters, with their tokenizer
    glyph_clip.py a small CLIP of captioned letters, and its weights, `glyph_clip.safetensors`; pretrain_clip.py:
                  trains them
    clip_methods.py  the compared methods on that CLIP; clip_page.py: its table and section of the report
    run.py        `slora demo`: all runs; record.py: its demo.json; page.py: its HTML report
    registration.py  the models and both data sets by name, for the other commands
"""

from slora.demo import registration as _registration  # noqa: F401 (registers itself)
