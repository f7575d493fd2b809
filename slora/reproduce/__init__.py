"""Published protocols, from local data and pretrained weights: `slora reproduce`.

protocols.py   what is known of each, what we chose, its runs and the published figures
needs.py       which weights and data are not on this machine, where they are looked for, and how to get them
run.py         fine-tunes and evaluates each run, resumes, and puts our figures beside the published ones
"""
