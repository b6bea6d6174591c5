"""Whole training steps of ringattn and its peers on one model and the same data.

`contenders` has a contender each for our trainer, plain PyTorch and DeepSpeed Ulysses; `groups`
starts the ranks of one, `rank` is what each of them does. `ringattn.benchmarks.suites.train_suite`
compares their losses and records their figures.
"""
