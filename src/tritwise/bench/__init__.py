"""Measurements: every update rule on the same model and the same batches, and the published benchmarks done again.

    rules                 the rules by name, and how each builds its model and optimizers
    layers                float layers that show ternary weights, and random trits with learned gains
    optimizers            SignSGD and Lion
    counters              rules for ternary weights other than ours: sign counters, Bop, ternary DQT
    harness               one run: a Cell in, a row of plain JSON out
    flips                 how ternary weights move during a run
    sweep                 many runs, side by side on several GPUs, resumed by what the file of rows already holds
    tuning                grids of rates, and more seeds at the best rate of each rule
    grid                  the optimizer grid at 1,668,128 weights
    true_ternary          the 14M-weight comparison with Adam and SignSGD
    contenders            its configurations, and how one is trained and measured
    phases                how long forward, backward and update of a step take
    memory                bytes a process holds, and the state of three billion weights, built and measured
    true_ternary_tables   its tables on a terminal
    step                  what a training step takes, ours beside float rivals in turns
    runner                one contender of it: a model that takes real steps
    sizes                 the models by name and by weights, and large ones built quickly
    kernel_bench          every kernel against its limit and against torch
    kernel_cases          what it runs, with bytes and operations counted from shapes
    capacity              the largest model that takes real steps in a given memory
    hardware              what the machine can do at most, measured

Tables and plots of rows are in `tritwise.report`.
"""
