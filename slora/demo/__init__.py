"""`slora demo`: adapt a small vision transformer that reads rendered letters to handwritten digits, on a CPU.

Nothing is downloaded: the letters are rendered from fonts inside matplotlib, the digits come with scikit-learn,
and the pretrained model is a file in this folder. Read in this order:

    letters.py    what the model knows: 52 rendered letters
    digits.py     what it is to learn: handwritten digits in the same format
    model.py      the model and its pretrained weights, `letters_vit.safetensors`
    pretrain.py   how those weights were made, and how to make them again
    run.py        the demo: four ways of adapting, what each learned and what it forgot
    registration.py  the model and both data sets by name, for the other commands
"""

from slora.demo import registration as _registration  # noqa: F401 (registers itself)
