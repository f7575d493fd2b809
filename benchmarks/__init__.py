"""What is fast, measured: each case writes one JSON file under `results/`, from which the tables are made.

The files in the order of reading:

    __main__.py                      the command line: run, report, compare, targets, compatibility, gpu
    results.py                       settings of a run, the list of cases, result files
    cases/                           the grid of each case, and how a point is checked; rounds.py times it
    implementations/, models.py      what is compared: ways to compute a layer and to train a model
    correctness.py                   the one check of results
    timing.py, memory.py             how one time and one peak of memory are taken
    roofline.py                      what the device reaches, and the floor of a layer
    targets.toml, targets.py         what the work is held to
    compare.py                       two result files side by side
    report/                          from result files to pages, tables and figures
    compatibility/                   which architectures slora adapts correctly
    gpu.py, gpu_steps.py             the validation on a GPU: its stages, and what each step runs
    candidates.py, workers.py        every candidate of the kernels against a reference, in processes of their own
    sanitizer_runs.py                what compute-sanitizer and the profiler watch
    audit.py, compile_cases.py       what the compiler makes of the kernels, without a GPU, and which kernels that are
"""
