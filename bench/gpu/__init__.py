"""Everything about one GPU, in three calls of a few minutes each: docs/dev/gpu-run.md.

A stage is a kind of question (is it correct, how fast is it), a family is what answers it in a
process of its own (one strategy of one backend), an item is one case. The parent process
(runner.py, state.py, plan.py) imports nothing but the standard library, so that nothing a kernel
does can reach it; worker.py is the process that runs items.
"""
